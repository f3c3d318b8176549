"""Coordinate descent on the integers of a matrix, from what GPTQ chose: each column is rounded anew, knowing all others.

QuantEase: Behdin et al. 2023, https://arxiv.org/abs/2309.01885. Rounds alternate with scales fitted to the integers.
"""

import torch
from torch import Tensor

from llmtrt.quantization.replay import replayed
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
            q[:, part] = _round(
                gradient[:, part].clone(), q[:, part], scales[:, part], hessian[part, part], diagonal[part]
            )
            # What these columns' steps mean for all others, at once: none of those was looked at meanwhile.
            gradient -= (scales[:, part] * (q - before)[:, part]) @ hessian[part]
        if (q != before).sum() < _SETTLED * q.numel():
            break
    return q[:, order.argsort()]


@replayed
def _round(gradient: Tensor, q: Tensor, scales: Tensor, hessian: Tensor, diagonal: Tensor) -> Tensor:
    """The columns ``q`` rounded anew; all are of those columns, and ``gradient`` is spent."""
    integers = []
    for column in range(q.shape[1]):
        at, now = scales[:, column], q[:, column]
        integers.append(quantize(at * now + gradient[:, column] / diagonal[column], at))
        gradient -= (at * (integers[-1] - now))[:, None] * hessian[column]
    return torch.stack(integers, 1)
