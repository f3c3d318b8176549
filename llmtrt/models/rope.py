"""Rotary position embeddings (https://arxiv.org/abs/2104.09864) and how models stretch them to longer contexts."""

import math
from dataclasses import dataclass

import numpy as np

from llmtrt.models.config import ConfigReader


@dataclass(frozen=True)
class Rope:
    """cos and sin of angle p · inv_freq[j] at position p, both times ``scaling``; ``inv_freq`` is fp32 [rotary dim / 2].

    ``note`` tells a user of a choice that this rope embodies, empty where there was none.
    """

    inv_freq: np.ndarray
    scaling: float = 1.0
    note: str = ""


def read_rope(
    parameters: ConfigReader,
    head_dim: int,
    max_positions: int,
    max_seq: int,
    original: int | None = None,
    partial: float | None = None,
    theta: float | None = None,
) -> Rope:
    """The Rope that ``rope_parameters`` (or, in older files, ``rope_scaling`` with ``theta`` beside it) describes.

    ``max_positions`` is the configuration's max_position_embeddings, ``original`` what it was before stretching if the
    configuration says so outside of ``parameters``, ``partial`` the rotated share of ``head_dim`` for the families that
    have one (in the others the field is not understood, hence refused). Raises UserError for a type or field that is not
    implemented, and for numbers that make no frequencies.
    """
    kind = parameters.raw("rope_type") or parameters.raw("type") or "default"
    parameters.raw("type")
    base = parameters.number("rope_theta", theta if theta is not None else 10000.0)
    if base <= 1 or base != (theta or base):
        raise parameters.refuse(
            f"rope_theta should be one number above 1, but is {base}" + (f" and {theta}" if theta else "")
        )
    share = 1.0 if partial is None else parameters.number("partial_rotary_factor", partial)
    dim = int(head_dim * share)
    if dim % 2 or not 0 < dim <= head_dim:
        raise parameters.refuse(f"the rotary dimension should be an even number up to {head_dim}, but is {dim}")
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    powers = np.float32(base) ** exponent
    readers = {
        "default": _default,
        "linear": _linear,
        "llama3": _llama3,
        "yarn": _yarn,
        "longrope": _longrope,
        "su": _longrope,
    }
    if not isinstance(kind, str) or kind not in readers:
        raise parameters.refuse(f"rope_type is {kind!r}, which llmtrt does not implement: it has {', '.join(readers)}")
    original = parameters.count("original_max_position_embeddings", original) or max_positions
    if original < 2:
        raise parameters.refuse("original_max_position_embeddings should be at least 2")
    with np.errstate(all="ignore"):
        rope = readers[kind](parameters, powers, base, original, max_positions, max_seq)
    parameters.finish()
    if not (np.isfinite(rope.inv_freq).all() and (rope.inv_freq > 0).all() and 0 < rope.scaling < 1e6):
        raise parameters.refuse("its numbers give frequencies that are not positive and finite: check them")
    return rope


def _default(parameters, powers, base, original, max_positions, max_seq) -> Rope:
    return Rope(1 / powers)


def _linear(parameters, powers, base, original, max_positions, max_seq) -> Rope:
    """Position interpolation, https://arxiv.org/abs/2306.15595."""
    return Rope(1 / powers / np.float32(parameters.number("factor")))


def _llama3(parameters, powers, base, original, max_positions, max_seq) -> Rope:
    """Llama 3.1's: long waves divided by the factor, short ones kept, a ramp between (https://arxiv.org/abs/2407.21783)."""
    factor = parameters.number("factor")
    low, high = parameters.number("low_freq_factor"), parameters.number("high_freq_factor")
    if high <= low:
        raise parameters.refuse(f"high_freq_factor = {high} should be more than low_freq_factor = {low}")
    inv_freq = 1 / powers.astype(np.float64)
    turns = original * inv_freq / (2 * math.pi)  # turns that a dimension makes within the original context
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return Rope((kept * inv_freq + (1 - kept) * inv_freq / factor).astype(np.float32))


def _yarn(parameters, powers, base, original, max_positions, max_seq) -> Rope:
    """YaRN, https://arxiv.org/abs/2309.00071."""
    factor = parameters.number("factor")
    fast, slow = parameters.number("beta_fast", 32), parameters.number("beta_slow", 1)
    mscale, mscale_all = parameters.number("mscale", None), parameters.number("mscale_all_dim", None)
    truncate = parameters.flag("truncate", True)
    dim = 2 * len(powers)

    def dimension(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(fast), dimension(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    stretched = np.clip((np.arange(dim // 2) - low) / ((high - low) or 0.001), 0, 1)
    inv_freq = 1 / powers.astype(np.float64)
    mixed = inv_freq / factor * stretched + inv_freq * (1 - stretched)

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    default = magnitude(mscale) / magnitude(mscale_all) if mscale and mscale_all else magnitude(1)
    return Rope(mixed.astype(np.float32), parameters.number("attention_factor", default))


def _longrope(parameters, powers, base, original, max_positions, max_seq) -> Rope:
    """LongRoPE, https://arxiv.org/abs/2402.13753: one set of factors up to the original context, another beyond.

    Which of them a token sees must not change while its keys lie in the cache, so the declared capacity decides.
    """
    short, long = (parameters.numbers(name, len(powers)) for name in ("short_factor", "long_factor"))
    factor = parameters.number("factor", max_positions / original)
    default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    scaling = parameters.number("attention_factor", default)
    is_long = max_seq > original
    note = (
        f"long RoPE uses its {'long' if is_long else 'short'} factors, because the declared capacity of {max_seq} tokens is "
        f"{'more than' if is_long else 'within'} the original {original}"
    )
    factors = np.asarray(long if is_long else short, np.float32)
    return Rope(
        1 / (factors * powers), scaling, note + (f"; --max-seq {original} chooses the short ones" if is_long else "")
    )
