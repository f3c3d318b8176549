"""A Hugging Face style config from a GGUF file's metadata, for the architectures that llama.cpp and we share."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llmtrt.checkpoints.gguf_file import GgufHeader
from llmtrt.checkpoints.gguf_names import ARCHITECTURES, ROPE_FREQS, ROPE_LONG, ROPE_SHORT
from llmtrt.errors import UserError

_CLASSES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "phi3": ("Phi3ForCausalLM", "phi3"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
}
_SILENT = {"vocab_size", "rope.scaling.finetuned"}  # say nothing that the tensors do not say, or nothing at all
_OFF = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True, "rope.scaling.type": "none"}
# Words of a vocabulary that end an answer, though the metadata names but one: what llama.cpp stops at, too.
_ENDS = {"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"}


class _Fields:
    """The metadata ``<architecture>.*``; remembers what was asked for, so that the rest can be refused."""

    def __init__(self, path: Path, architecture: str, metadata: dict):
        prefix = f"{architecture}."
        self._path, self._prefix = path, prefix
        self._left = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}

    def take(self, name: str, default=None):
        value = self._left.pop(name, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            return value[0]  # the same for every layer
        return value

    def count(self, name: str, default: int | None = None) -> int:
        value = self.take(name, default)
        if type(value) is not int or not 0 < value < 1 << 31:
            key = self._prefix + name
            raise UserError(f"{self._path}: {key} should be a positive integer, but is {str(value)[:80]}")
        return value

    def number(self, name: str, default: float | None = None) -> float | None:
        """A non-negative number, or None where it is absent and has no default."""
        value = self.take(name, default)
        if value is not None and (type(value) not in (int, float) or not 0 <= value < 1e30):
            raise UserError(f"{self._path}: {self._prefix}{name} should be a number, but is {str(value)[:80]}")
        return value

    def finish(self) -> None:
        for name in _SILENT:
            self._left.pop(name, None)
        left = sorted(name for name, value in self._left.items() if name not in _OFF or value != _OFF[name])
        if left:
            raise UserError(
                f"{self._path}: llmtrt does not implement {self._prefix}{left[0]} = {str(self._left[left[0]])[:80]}: "
                "bring the safetensors checkpoint"
            )


def config_of(path: Path, header: GgufHeader, read: Callable[[str], np.ndarray]) -> dict:
    """The config of ``header``; ``read(name)`` gives a float32 tensor of the file.

    Raises UserError for an architecture or a field that is missing or not implemented.
    """
    metadata = header.metadata
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"{path}: the architecture {architecture!r} is not supported: llmtrt reads {known}")
    if metadata.get("split.count", 1) not in (0, 1):
        raise UserError(f"{path} is one part of a split GGUF: join the parts with `llama-gguf-split --merge`")
    fields = _Fields(path, architecture, metadata)
    hidden, heads = fields.count("embedding_length"), fields.count("attention.head_count")
    head_dim = fields.count("attention.key_length", hidden // heads)
    if fields.count("attention.value_length", head_dim) != head_dim:
        raise UserError(f"{path}: keys and values of different length are not supported: bring another checkpoint")
    if "token_embd.weight" not in header.tensors:
        raise UserError(f"{path} lacks the tensor token_embd.weight: expected a whole model")
    name, model_type = _CLASSES[architecture]
    config = {
        "architectures": [name],
        "model_type": model_type,
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": fields.count("feed_forward_length"),
        "num_hidden_layers": fields.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": fields.count("context_length"),
        "rope_theta": fields.number("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    rotary = fields.count("rope.dimension_count", head_dim)
    if rotary != head_dim:
        share = rotary / head_dim
        # Readers take int(head_dim · share): a quotient rounded down would cost them a dimension.
        config["partial_rotary_factor"] = share if int(head_dim * share) == rotary else math.nextafter(share, 1)
    if architecture == "gemma3":
        config |= _gemma3(path, fields, config)
    else:
        config["hidden_act"] = "silu"
    if architecture in ("llama", "qwen3"):
        config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    if architecture == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    if architecture in ("llama", "phi3") and (window := fields.number("attention.sliding_window", 0)):
        config["sliding_window"] = window
        if architecture == "llama":  # Hugging Face's Llama has no window, its Mistral does
            del config["attention_bias"], config["mlp_bias"]
            config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    config |= _rope(path, fields, header, config, rotary, read)
    for field, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        config[field] = metadata.get(f"tokenizer.ggml.{key}_token_id")
    fields.finish()
    return config


def generation_config_of(metadata: dict) -> dict:
    """generation_config.json's content: every token that ends an answer, and the sampling that the file recommends."""
    tokens, types = (metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    tokens, types = (value if isinstance(value, list) else [] for value in (tokens, types))
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    ends += [index for index, (token, kind) in enumerate(zip(tokens, types)) if kind in (3, 4) and token in _ENDS]
    config = {"eos_token_id": list(dict.fromkeys(end for end in ends if end is not None))}
    for field, key in (("temperature", "temp"), ("top_k", "top_k"), ("top_p", "top_p"), ("min_p", "min_p")):
        if (value := metadata.get(f"general.sampling.{key}")) is not None:
            config |= {field: value, "do_sample": True}
    return config


def _gemma3(path: Path, fields: _Fields, config: dict) -> dict:
    """What a Gemma 3 file leaves to llama.cpp's source: the scale, which layers are local, and their RoPE base."""
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    # The 27B alone, known by its depth, scales by hidden / heads.
    scalar = config["hidden_size"] // heads if layers == 62 else config["head_dim"]
    window, period = fields.number("attention.sliding_window", 0), fields.take("attention.sliding_window_pattern", 6)
    if type(period) is int and period > 0:
        period = [(index + 1) % period for index in range(layers)]
    local = [period] * layers if isinstance(period, bool) else period
    if not isinstance(local, list) or len(local) != layers:
        raise UserError(f"{path}: attention.sliding_window_pattern should say for each layer whether it is local")
    types = ["sliding_attention" if window and is_local else "full_attention" for is_local in local]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": window or None,
        "layer_types": types,
        "rope_local_base_freq": fields.number("rope.freq_base_swa", 10000.0),
        "final_logit_softcapping": fields.number("final_logit_softcapping") or None,
        "attn_logit_softcapping": fields.number("attn_logit_softcapping") or None,
    }


def _rope(path: Path, fields: _Fields, header: GgufHeader, config: dict, rotary: int, read) -> dict:
    kind, factor = fields.take("rope.scaling.type", "linear"), fields.number("rope.scaling.factor")
    original = fields.number("rope.scaling.original_context_length")
    found = {"original_max_position_embeddings": original} if original else {}
    tensors = {ROPE_FREQS, ROPE_SHORT, ROPE_LONG} & header.tensors.keys()
    for name in tensors:
        if header.tensors[name].shape != (rotary // 2,):
            raise UserError(f"{path}: tensor {name} should have {rotary // 2} factors: download the file again")
    stretched = kind != "none" and factor not in (None, 0.0, 1.0)
    if stretched and tensors:
        raise UserError(f"{path}: RoPE scaling {kind!r} beside {min(tensors)} is not supported: bring another file")
    if ROPE_FREQS in tensors:
        return found | {"rope_scaling": _factored(read(ROPE_FREQS), config, rotary)}
    if tensors:
        if not original or len(tensors) < 2:
            raise UserError(f"{path}: long RoPE needs {ROPE_LONG}, {ROPE_SHORT} and the original context length")
        short, long = _floats(read(ROPE_SHORT)), _floats(read(ROPE_LONG))
        scaling = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        if (attention := fields.number("rope.scaling.attn_factor")) is not None:
            scaling["attention_factor"] = attention
        return found | {"rope_scaling": scaling}
    if not stretched:
        return found
    if kind not in ("linear", "yarn"):
        raise UserError(f"{path}: RoPE scaling {kind!r} is not supported: bring the safetensors checkpoint")
    scaling = {"rope_type": kind, "factor": factor}
    for name in ("beta_fast", "beta_slow") if kind == "yarn" else ():
        if (beta := fields.number(f"rope.scaling.yarn_{name}")) is not None:
            scaling[name] = beta
    return found | {"rope_scaling": scaling}


def _factored(stored: np.ndarray, config: dict, rotary: int) -> dict:
    """RoPE whose inverse frequencies are divided by ``stored`` [rotary / 2].

    Told as Llama 3.1's scaling where that gives the same to float32's precision, else as long RoPE with the same
    factors at every length, which is just that division.
    """
    factor, low, high, original = float(str(stored.max())), 1.0, 4.0, 8192
    turns = original / (2 * math.pi * config["rope_theta"] ** (np.arange(0, rotary, 2) / rotary))
    kept = np.clip((turns - low) / (high - low), 0, 1)
    if np.allclose(stored, 1 / (kept + (1 - kept) / factor), rtol=2e-6, atol=0):
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
    factors = _floats(stored)
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": 1.0,
        "original_max_position_embeddings": config["max_position_embeddings"],
    }


def _floats(values: np.ndarray) -> list[float]:
    """The shortest decimals that give the same float32, as a config.json would have them."""
    return [float(str(value)) for value in values]
