"""The parts of calibrated quantization against plain NumPy in float64."""

import numpy as np
import pytest
import torch

from llmtrt.quantization.descent import descend
from llmtrt.quantization.gptq import gptq
from llmtrt.quantization.scales import expanded, fit_scales, search_scales
from llmtrt.quantization.statistics import Statistics

N, K, BLOCK, TOKENS = 24, 64, 16, 400


@pytest.fixture
def drawn():
    """Weight [N, K], correlated inputs [TOKENS, K] and their mean square [K, K], all fp32."""
    rng = np.random.default_rng(5)
    inputs = rng.standard_normal((TOKENS, K)) @ (rng.standard_normal((K, K)) * rng.uniform(0.1, 2, K)) / 8
    weight = rng.standard_normal((N, K)) * rng.uniform(0.2, 2, (N, 1))
    hessian = inputs.T @ inputs / TOKENS
    return [torch.from_numpy(each).float() for each in (weight, inputs, hessian)]


def error(weight, q, scale, inputs) -> float:
    """The mean square error of the product, in float64."""
    wrong = weight.double() - q.double() * expanded(scale, BLOCK).double()
    return float((inputs.double() @ wrong.T).square().mean())


def obq(weight: np.ndarray, hessian: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """GPTQ as its paper derives it: after each column the inverse Hessian of those that are left, by elimination."""
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(K)
    order = np.argsort(-np.diag(hessian), kind="stable")
    inverse, weight, q = np.linalg.inv(damped), weight.copy(), np.zeros(weight.shape)
    for column in order:
        at = scale[:, column // BLOCK]
        q[:, column] = np.clip(np.rint(weight[:, column] / at), -8, 7)
        wrong = (weight[:, column] - at * q[:, column]) / inverse[column, column]
        weight -= np.outer(wrong, inverse[column])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column] = inverse[:, column] = 0
        inverse[column, column] = 1
    return q


def test_gptq_is_optimal_brain_quantization(drawn):
    weight, inputs, hessian = drawn
    scale = search_scales(weight, hessian.diagonal(), BLOCK, torch.float16)
    q = gptq(weight, hessian, scale, BLOCK)
    wanted = obq(*(each.double().numpy() for each in (weight, hessian, scale)))
    assert (q.numpy() == wanted).mean() > 0.995  # a tie may fall to the other side in fp32
    nearest = (weight / expanded(scale, BLOCK)).round().clamp(-8, 7)
    assert error(weight, q, scale, inputs) < 0.6 * error(weight, nearest, scale, inputs)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_columns_in_several_batches_are_rounded_as_in_one(device, monkeypatch):
    """Of 128 and of 64 columns, twice over, so that a GPU replays what it captured."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch has no GPU here")
    rng, k = np.random.default_rng(6), 320
    inputs = torch.from_numpy(rng.standard_normal((800, k)) @ rng.standard_normal((k, k)) / 18).float()
    weight, hessian = torch.from_numpy(rng.standard_normal((N, k))).float(), inputs.T @ inputs / 800

    def solved(device: str) -> list[torch.Tensor]:
        on = [each.to(device) for each in (weight, hessian)]
        scale = search_scales(on[0], on[1].diagonal(), BLOCK, torch.float16)
        q = gptq(*on, scale, BLOCK)
        return [each.cpu() for each in (q, descend(*on, q, scale, BLOCK, torch.float16)[0])]

    first, second = solved(device), solved(device)
    monkeypatch.setattr("llmtrt.quantization.gptq._BATCH", k)
    monkeypatch.setattr("llmtrt.quantization.descent._BATCH", k)
    for found, again, whole in zip(first, second, solved("cpu")):
        assert torch.equal(found, again)
        assert (found == whole).float().mean() > 0.99  # a tie may fall to the other side in fp32


def test_searched_scales_are_the_best_of_their_grid(drawn):
    weight, _, hessian = drawn
    importance = hessian.diagonal()
    scale = search_scales(weight, importance, BLOCK, torch.float16)
    blocks, metric = weight.double().numpy().reshape(N, -1, BLOCK), importance.double().numpy().reshape(-1, BLOCK)

    def loss(scales):
        q = np.clip(np.rint(blocks / scales[..., None]), -8, 7)
        return (metric * (blocks - scales[..., None] * q) ** 2).sum(2)

    unclipped = np.maximum(blocks.max(2) / 7, blocks.min(2) / -8)
    grid = [np.float16(unclipped * (0.5 + 0.55 * step / 40)).astype(np.float64) for step in range(1, 41)]
    best = np.min([loss(scales) for scales in grid], axis=0)
    assert np.allclose(loss(scale.double().numpy()), best, rtol=1e-4)
    assert (scale.half().float() == scale).all()


def test_fitted_scales_are_least_squares(drawn):
    weight, inputs, hessian = drawn
    scale = search_scales(weight, hessian.diagonal(), BLOCK, torch.float32)
    q = (weight / expanded(scale, BLOCK)).round().clamp(-8, 7)
    fitted = fit_scales(weight, q, hessian, scale, BLOCK, torch.float32)
    x, w, integers = (each.double().numpy() for each in (inputs, weight, q))
    for row in range(N):
        parts = (x * integers[row]).reshape(TOKENS, -1, BLOCK).sum(2)
        wanted = np.linalg.lstsq(parts, x @ w[row], rcond=None)[0]
        assert np.allclose(fitted[row], wanted, rtol=2e-3)


def test_descent_only_improves_and_ends_where_no_single_integer_can(drawn):
    weight, inputs, hessian = drawn
    scale = search_scales(weight, hessian.diagonal(), BLOCK, torch.float16)
    first = gptq(weight, hessian, scale, BLOCK)
    q, better = descend(weight, hessian, first, scale, BLOCK, torch.float16)
    assert error(weight, q, better, inputs) < 0.97 * error(weight, first, scale, inputs)
    assert q.min() >= -8 and q.max() <= 7 and (q == q.round()).all()


def test_a_block_of_zeros_stays_zero():
    weight, hessian = torch.zeros(4, 32), torch.eye(32)
    weight[:, 16:] = torch.linspace(-1, 1, 16)
    scale = search_scales(weight, hessian.diagonal(), 16, torch.float16)
    q, scale = descend(weight, hessian, gptq(weight, hessian, scale, 16), scale, 16, torch.float16)
    assert torch.isfinite(scale).all() and not (q * expanded(scale, 16))[:, :16].any()


def test_statistics_in_parts_are_those_of_the_whole_and_compensate(drawn):
    weight, inputs, _ = drawn
    rng = np.random.default_rng(6)
    x, r = inputs.numpy().astype(np.float64), rng.standard_normal((TOKENS, N))
    seen, r_seen = (each + 0.1 * rng.standard_normal(each.shape) for each in (x, r))
    found = Statistics.empty(K, N, "cpu")
    for part in np.array_split(np.arange(TOKENS), 3):
        found.add(*(torch.from_numpy(each[part]).float() for each in (x, seen, r, r_seen)))
    assert np.allclose(found.hessian, seen.T @ seen / TOKENS, atol=1e-5)
    assert np.allclose(found.drift, (x - seen).T @ seen / TOKENS, atol=1e-5)
    assert np.allclose(found.residual_drift, (r - r_seen).T @ seen / TOKENS, atol=1e-5)
    w = weight.double().numpy()
    target = found.compensated(weight, share=1, damping=1e-9).double().numpy()
    wanted = np.linalg.lstsq(seen, x @ w.T + r - r_seen, rcond=None)[0].T
    assert np.allclose(target, wanted, atol=2e-3 * np.abs(wanted).max())
