"""Coordinate descent on the integers of a matrix, from what GPTQ chose: each column is rounded anew, knowing all others.

QuantEase: Behdin et al. 2023, https://arxiv.org/abs/2309.01885. Rounds alternate with scales fitted to the integers.
"""

import torch
from torch import Tensor

from llmtrt.quantization.scales import expanded, fit_scales, quantize
from llmtrt.quantization.statistics import damp

_ROUNDS, _SWEEPS = 2, 2
_DAMPING = 1e-4
_BATCH = 128  # columns whose steps are made known to all others together
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
    return q, fit_scales(weight, q, damped, scale, block, dtype)


def _sweep(weight: Tensor, hessian: Tensor, q: Tensor, scale: Tensor, block: int) -> Tensor:
    order = hessian.diagonal().argsort(descending=True, stable=True)
    scales, hessian = expanded(scale, block), hessian[order][:, order]
    gradient = ((weight - scales * q)[:, order]) @ hessian
    q, scales, diagonal = q[:, order], scales[:, order], hessian.diagonal()
    for _ in range(_SWEEPS):
        before = q.clone()
        for start in range(0, len(order), _BATCH):
            part = slice(start, start + _BATCH)
            _descend_in(part, q, scales, gradient[:, part].clone(), hessian[part, part], diagonal)
            # What these columns' steps mean for all others, at once: none of those was looked at meanwhile.
            gradient -= (scales[:, part] * (q - before)[:, part]) @ hessian[part]
        if (q != before).sum() < _SETTLED * q.numel():
            break
    return q[:, order.argsort()]


def _descend_in(part: slice, q: Tensor, scales: Tensor, gradient: Tensor, hessian: Tensor, diagonal: Tensor) -> None:
    """Rounds the columns ``part`` of ``q`` anew, in place; ``gradient`` and ``hessian`` are of those columns."""
    for column in range(gradient.shape[1]):
        at, now = scales[:, part.start + column], q[:, part.start + column]
        best = quantize(at * now + gradient[:, column] / diagonal[part.start + column], at)
        gradient -= (at * (best - now))[:, None] * hessian[column]
        q[:, part.start + column] = best
