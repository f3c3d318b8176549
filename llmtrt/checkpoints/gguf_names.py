"""llama.cpp's tensor names and the Hugging Face names that they stand for."""

import re
from collections.abc import Iterable
from pathlib import Path

from llmtrt.errors import UserError

# Not weights but RoPE's frequency factors: gguf_config puts them into the config.
ROPE_FREQS, ROPE_SHORT, ROPE_LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LLAMA = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QWEN3 = _LLAMA | {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_INNER = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _QWEN3,
    "phi3": {
        "attn_norm": "input_layernorm",
        "attn_qkv": "self_attn.qkv_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
    },
    "gemma3": _QWEN3
    | {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
ARCHITECTURES = tuple(_INNER)
_BLOCK = re.compile(r"blk\.(0|[1-9]\d{0,4})\.(\w+)\.(weight|bias)")


def huggingface_names(path: Path, architecture: str, names: Iterable[str]) -> dict[str, str]:
    """Hugging Face name → the file's name of every weight; UserError names one that the architecture does not have."""
    found = {}
    for name in names:
        if name in (ROPE_FREQS, ROPE_SHORT, ROPE_LONG):
            continue
        stem, _, kind = name.rpartition(".")
        if match := _BLOCK.fullmatch(name):
            inner = _INNER[architecture].get(match[2])
            renamed = f"model.layers.{match[1]}.{inner}.{match[3]}" if inner else None
        else:
            renamed = f"{_OUTER[stem]}.{kind}" if stem in _OUTER and kind == "weight" else None
        if renamed is None:
            raise UserError(f"{path}: tensor {name} is in no {architecture} that llmtrt knows: bring another file")
        found[renamed] = name
    return found
