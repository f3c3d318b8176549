"""Tiny GGUF files, written with gguf.GGUFWriter the way llama.cpp's converter lays a model out."""

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB, LAYERS = 64, 4, 2, 16, 96, 40, 2


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp's Llama has them: row 2i of a head is Hugging Face's row i, row 2i + 1 i + half."""
    moved = np.empty_like(rows)
    size = len(rows) // heads
    for head in range(heads):
        for i in range(size // 2):
            moved[head * size + 2 * i] = rows[head * size + i]
            moved[head * size + 2 * i + 1] = rows[head * size + size // 2 + i]
    return moved


def weights(architecture: str, tied: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights under Hugging Face's names."""
    random = np.random.default_rng(seed)
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,), "self_attn.o_proj": (HIDDEN, q)}
    if architecture == "phi3":
        shapes |= {"self_attn.qkv_proj": (q + 2 * kv, HIDDEN), "mlp.gate_up_proj": (2 * FFN, HIDDEN)}
    else:
        shapes |= {"self_attn.q_proj": (q, HIDDEN), "self_attn.k_proj": (kv, HIDDEN), "self_attn.v_proj": (kv, HIDDEN)}
        shapes |= {"mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN)}
    shapes["mlp.down_proj"] = (HIDDEN, FFN)
    if architecture in ("qwen3", "gemma3"):
        shapes |= {"self_attn.q_norm": (HEAD_DIM,), "self_attn.k_norm": (HEAD_DIM,)}
    if architecture == "gemma3":
        shapes |= {"pre_feedforward_layernorm": (HIDDEN,), "post_feedforward_layernorm": (HIDDEN,)}
    found = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not tied:
        found["lm_head.weight"] = (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}
        if architecture == "qwen2":
            biases = {"q_proj": q, "k_proj": kv, "v_proj": kv}
            found |= {f"model.layers.{layer}.self_attn.{name}.bias": (size,) for name, size in biases.items()}
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in found.items()}


_CONVERTER_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
}
_GEMMA_NAMES = _CONVERTER_NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def converted(architecture: str, name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """A weight's name and value in the file."""
    names = _GEMMA_NAMES if architecture == "gemma3" else _CONVERTER_NAMES
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        layer, _, inner = stem.removeprefix("model.layers.").partition(".")
        stem = f"blk.{layer}.{names[inner]}"
    else:
        stem = names[stem]
    if architecture == "llama" and stem.endswith((".attn_q", ".attn_k")):
        value = interleaved(value, HEADS if stem.endswith("q") else KV_HEADS)
    if architecture == "gemma3" and name.endswith("norm.weight"):
        value = value + np.float32(1)
    return f"{stem}.{kind}", value


def write(
    path: Path, architecture: str, tensors: dict[str, np.ndarray], kind: Type = Type.F32, metadata=None, extra=None
) -> Path:
    """A GGUF file whose matrices are stored as ``kind``; ``metadata``: more keys, None to leave one out; ``extra``:
    float32 tensors under the file's own names."""
    writer = gguf.GGUFWriter(path, architecture)
    keys = {
        "context_length": 512,
        "embedding_length": HIDDEN,
        "block_count": LAYERS,
        "feed_forward_length": FFN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": HEAD_DIM,
    }
    named = {f"{architecture}.{key}": value for key, value in keys.items()} | (metadata or {})
    for key, value in named.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, value in tensors.items():
        stored, value = converted(architecture, name, value)
        if value.ndim == 1 or kind == Type.F32:
            writer.add_tensor(stored, value)
        else:
            writer.add_tensor(stored, gguf.quants.quantize(value, kind), raw_dtype=kind)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dequantized(value: np.ndarray, kind: Type) -> np.ndarray:
    """What is left of a matrix after storing it as ``kind``."""
    return value if value.ndim == 1 else gguf.quants.dequantize(gguf.quants.quantize(value, kind), kind)
