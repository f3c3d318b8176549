"""GPTQ: columns are rounded one after the other, and what each rounding does wrong is made up for by the columns after it.

Frantar et al. 2022, https://arxiv.org/abs/2210.17323, with columns in the order of falling importance ("act order") and
scales that are chosen before ("static groups"), so that blocks lie in memory as they did and no input is permuted.
"""

import torch
from torch import Tensor

from llmtrt.quantization.replay import replayed
from llmtrt.quantization.scales import expanded, quantize
from llmtrt.quantization.statistics import damp

_DAMPING = 0.01  # of the mean of the Hessian's diagonal
_BATCH = 128  # columns whose updates of the rest are made together


def gptq(weight: Tensor, hessian: Tensor, scale: Tensor, block: int) -> Tensor:
    """Integers, fp32 [N, K] with values −8 … 7, for ``weight`` [N, K] with ``scale`` [N, K / block].

    ``hessian`` [K, K] is the mean of x xᵀ over the inputs x of the product.
    """
    k = weight.shape[1]
    order = hessian.diagonal().argsort(descending=True, stable=True)
    work, scales = weight[:, order], expanded(scale, block)[:, order]
    upper = _inverse_factor(hessian[order][:, order])
    q = torch.empty_like(work)
    for start in range(0, k, _BATCH):
        part, rest = slice(start, start + _BATCH), slice(start + _BATCH, k)
        q[:, part], errors = _round(work[:, part], scales[:, part], upper[part, part])
        work[:, rest] -= errors @ upper[part, rest]
    return q[:, order.argsort()]


@replayed
def _round(weight: Tensor, scales: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Integers and what their errors are to the columns after them, [N, columns] each; ``weight`` is spent."""
    integers, errors = [], []
    for column in range(weight.shape[1]):
        at = scales[:, column]
        integers.append(quantize(weight[:, column], at))
        errors.append((weight[:, column] - at * integers[-1]) / factor[column, column])
        weight[:, column:] -= errors[-1][:, None] * factor[column, column:]
    return torch.stack(integers, 1), torch.stack(errors, 1)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse."""
    damped = damp(hessian.double(), _DAMPING)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()
