"""Coordinate descent on the integers of a matrix, from what GPTQ chose: each column is rounded anew, knowing all others.

QuantEase: Behdin et al. 2023, https://arxiv.org/abs/2309.01885. Rounds alternate with scales fitted to the integers.
"""

import torch
from torch import Tensor

from llmtrt.quantization.scales import expanded, fit_scales, quantize
from llmtrt.quantization.statistics import damp

_ROUNDS, _SWEEPS = 2, 2
_DAMPING = 1e-4
_SETTLED = 1e-4  # share of the integers that a sweep still changes


def descend(
    weight: Tensor, hessian: Tensor, q: Tensor, scale: Tensor, block: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Better integers and scales than ``q`` [N, K] and ``scale`` [N, K / block]: no step makes the error of the product,
    tr((W − Ŵ) H (W − Ŵ)ᵀ), larger, but for the rounding of scales to ``dtype``."""
    damped = damp(hessian, _DAMPING)
    for _ in range(_ROUNDS):
        scale = fit_scales(weight, q, damped, scale, block, dtype)
        q = _sweep(weight, damped, q, scale, block)
    return q, scale


def _sweep(weight: Tensor, hessian: Tensor, q: Tensor, scale: Tensor, block: int) -> Tensor:
    q, scales, diagonal = q.clone(), expanded(scale, block), hessian.diagonal()
    gradient = (weight - scales * q) @ hessian
    for _ in range(_SWEEPS):
        changed = 0
        for column in diagonal.argsort(descending=True, stable=True).tolist():
            at = scales[:, column]
            best = quantize(at * q[:, column] + gradient[:, column] / diagonal[column], at)
            rows = (best != q[:, column]).nonzero()[:, 0]
            changed += len(rows)
            if len(rows):
                step = at[rows] * (best - q[:, column])[rows]
                gradient[rows] -= step[:, None] * hessian[column]
                q[rows, column] = best[rows]
        if changed < _SETTLED * q.numel():
            break
    return q
