"""Scales of symmetric INT4 blocks: searched before the integers are chosen, and fitted to them after."""

import torch
from torch import Tensor

LOWEST, HIGHEST = -8, 7
_STEPS, _LEAST, _MOST = 40, 0.5, 1.05  # of the search, as shares of the scale at which nothing is clipped


def search_scales(weight: Tensor, importance: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """Scales, fp32 [N, K / block] with values of ``dtype``, for ``weight`` [N, K]: those of a grid with the least
    Σ importance · (w − s q)² over each block.

    ``importance`` [K] is the mean square of each input, so that this is the block's error in the product if inputs were
    not correlated (the clipping search of AWQ, https://arxiv.org/abs/2306.00978, with a diagonal metric).
    """
    blocks, metric = weight.unflatten(1, (-1, block)), importance.reshape(-1, block)
    unclipped = torch.maximum(blocks.amax(2) / HIGHEST, blocks.amin(2) / LOWEST)
    tiny = torch.finfo(torch.float32).tiny
    best, least = unclipped, torch.full_like(unclipped, torch.inf)
    for step in range(1, _STEPS + 1):
        scale = rounded(unclipped * (_LEAST + (_MOST - _LEAST) * step / _STEPS), dtype)
        error = blocks - scale[..., None] * quantize(blocks, scale[..., None].clamp_min(tiny))
        error = (error.square_() * metric).sum(2)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best.masked_fill(best == 0, 1.0)  # a block of zeros, or one below what dtype can tell from zero


def fit_scales(weight: Tensor, q: Tensor, hessian: Tensor, scale: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """The scales of given integers ``q`` [N, K] with the least error of the product, by least squares for each row of
    ``weight``: s = (Qᵀ H Q)⁻¹ Qᵀ H w, where column g of Q holds the row's integers of block g. Where that is not above zero,
    as for a block of zeros, ``scale`` stays.
    """
    n, k = weight.shape
    count = k // block
    right = (q * (weight @ hessian)).unflatten(1, (count, block)).sum(2)
    left = torch.empty(n, count, count, device=weight.device)
    for index in range(count):
        part = slice(index * block, (index + 1) * block)
        left[:, index] = ((q[:, part] @ hessian[part]) * q).unflatten(1, (count, block)).sum(2)
    left = (left + left.mT) / 2
    diagonal = left.diagonal(dim1=1, dim2=2)
    diagonal += 1e-6 * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny
    fitted = rounded(torch.linalg.solve(left, right), dtype)
    return torch.where((fitted > 0) & fitted.isfinite(), fitted, scale)


def quantize(values: Tensor, scale: Tensor) -> Tensor:
    """The nearest integers of a block of ``scale``, as floats."""
    return (values / scale).round_().clamp_(LOWEST, HIGHEST)


def expanded(scale: Tensor, block: int) -> Tensor:
    """[N, K / block] → [N, K]."""
    return scale.repeat_interleave(block, 1)


def rounded(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 with values that ``dtype`` has."""
    return scale.to(dtype).float()
