"""Round to nearest: symmetric INT4 in blocks along K, one scale each (the baseline of https://arxiv.org/abs/2210.17323)."""

import numpy as np


def round_to_nearest(
    weight: np.ndarray, block: int, scale_dtype: np.dtype, largest: int = 7
) -> tuple[np.ndarray, np.ndarray]:
    """Quantizes fp32 ``weight`` [N, K] in blocks of ``block`` along K (which it divides).

    Returns q, int8 [N, K] with values −largest … largest, and scale [N, K / block] of ``scale_dtype``: the block's largest
    magnitude / ``largest``, rounded to that type before q is chosen. A block of zeros has scale 1. A scale that is not
    finite in its type is returned as it is: the caller says of which tensor.
    """
    n, k = weight.shape
    blocks = weight.reshape(n, k // block, block)
    peak = np.maximum(blocks.max(axis=2), -blocks.min(axis=2))
    with np.errstate(over="ignore"):
        scale = (peak / np.float32(largest)).astype(scale_dtype)
    used = scale.astype(np.float32)
    # Also where the scale underflows to zero: such a block is below what the type can tell from zero.
    scale[used == 0] = 1
    used[used == 0] = np.inf
    q = np.rint(blocks * (1 / used)[:, :, None])
    return np.clip(q, -largest, largest).astype(np.int8).reshape(n, k), scale


def choose_block(k: int, wanted: int) -> int | None:
    """The largest block up to ``wanted`` that divides K, halving down to 16, the least that both runtimes take."""
    while wanted >= 16:
        if k % wanted == 0:
            return wanted
        wanted //= 2
    return None
