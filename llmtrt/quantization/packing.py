"""Integers to bytes: INT4 as ONNX stores it, and tables whose rows can be gathered."""

import numpy as np


def pack_int4(q: np.ndarray) -> np.ndarray:
    """int8 values −8…7 → uint8, two to a byte over the flattened array, the first in the low half (ONNX TensorProto)."""
    flat = q.reshape(-1).view(np.uint8) & 15
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return flat[0::2] | (flat[1::2] << 4)


def pack_table(q: np.ndarray, bits: int) -> np.ndarray:
    """int8 [V, H] → int32 [V, H · bits / 32]: the bits of Σ (vⱼ + half) · 2^(bits · j), where half = 2^(bits − 1)."""
    per_word = 32 // bits
    digits = (q.reshape(q.shape[0], -1, per_word) + np.int16(1 << bits - 1)).astype(np.uint32)
    return (digits << (bits * np.arange(per_word, dtype=np.uint32))).sum(axis=2, dtype=np.uint32).view(np.int32)
