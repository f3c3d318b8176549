"""The sampler's graph on ONNX Runtime against the host's Sampler and NumPy in float64, and TensorRT-RTX's builder."""

import functools

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import trt_probe

from llmtrt.errors import UserError
from llmtrt.graph.builder import GraphBuilder
from llmtrt.graph.lint import lint_model
from llmtrt.graph.sampler import _first_past, write_sampler
from llmtrt.runtime.params import SamplingParams
from llmtrt.runtime.sampling import Sampler, distribution, penalized

STEPS = 6  # N, the columns of noise
TOLERANCE = 1e-5  # of noise: what fp32 sums and a token at the border of top_p may move a border by
NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
CASES = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.8},
    {"temperature": 0.0, "top_k": 3, "top_p": 0.1, "min_p": 0.5},
    {"temperature": 1.0},
    {"temperature": 100.0},
    {"temperature": 1e-6},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 3.0, "top_k": 40},
    {"temperature": 100.0, "top_k": 50},
    {"temperature": 1.5, "top_k": 1_000_000},
    {"temperature": 0.9, "top_p": 0.5},
    {"temperature": 5.0, "top_p": 0.999},
    {"temperature": 2.0, "top_p": 1e-9},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 2.0, "min_p": 1.0},
    {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.1, "top_k": 30, "top_p": 0.8, "repetition_penalty": 1.4},
    {"temperature": 2.0, "repetition_penalty": 0.6},
]


@functools.cache
def session(vocab_size, greedy_only=False):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = ir.to_proto(write_sampler(vocab_size, greedy_only)).SerializeToString()
    return onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])


def run(logits, params=None, noise=None, steps=0, seen=None, positions=0, last_rows=1000):
    """The outputs by name for ``logits`` [B, V], one of ``params`` a row; greedy only without any."""
    batch, vocab_size = logits.shape

    def column(value, dtype=np.int64):
        return np.broadcast_to(np.asarray(value, dtype).reshape(-1, 1), (batch, 1)).copy()

    feeds = {"logits": logits[:, None], "positions": column(positions), "last_rows": column(last_rows)}
    if params is not None:
        feeds |= {name: column([getattr(each, name) for each in params], np.float32) for name in NAMES}
        feeds |= {"noise": noise, "steps": column(steps)}
        feeds["seen"] = np.zeros(logits.shape, bool) if seen is None else seen
    here = session(vocab_size, params is None)
    return dict(zip([output.name for output in here.get_outputs()], here.run(None, feeds)))


def random_logits(rng, vocab_size):
    """fp32 [V]: smooth ones, ones with ties, with a masked half, or with two tokens alone."""
    logits = rng.normal(size=vocab_size) * rng.choice([0.5, 3, 8])
    match rng.integers(4):
        case 1:
            logits = np.round(logits * 4) / 4
        case 2:
            logits[rng.random(vocab_size) < 0.5] = -np.inf
        case 3:
            logits[rng.permutation(vocab_size)[2:]] = rng.choice([-np.inf, np.finfo(np.float32).min])
    return logits.astype(np.float32)


def shares(logits, params, seen):
    """float64 [V]: the exact distribution, with every tie at the border of top_p."""
    scores = logits.astype(np.float64)
    if params.repetition_penalty != 1:
        scores = penalized(scores, np.flatnonzero(seen), float(np.float32(params.repetition_penalty)))
    weights = np.exp((scores - scores.max()) / np.float32(params.temperature))
    if 0 < params.top_k < len(weights):
        weights[scores < np.sort(scores)[-params.top_k]] = 0
    if params.top_p < 1:
        falling = np.sort(weights)[::-1]
        enough = np.searchsorted(np.cumsum(falling), params.top_p * weights.sum() * (1 - 1e-9))
        weights[weights < falling[enough] * (1 - 1e-7)] = 0
    weights[weights < params.min_p] = 0
    return weights / weights.sum()


@pytest.mark.parametrize(("vocab_size", "rounds"), [(97, 300), (128, 300), (1000, 300), (20_000, 100), (49152, 100)])
def test_tokens_are_those_of_the_host(vocab_size, rounds):
    rng = np.random.default_rng(vocab_size)
    differing = total = 0
    for _ in range(rounds):
        batch = int(rng.integers(1, 5))
        params = [SamplingParams(**rng.choice(CASES), seed=int(rng.integers(1 << 62))) for _ in range(batch)]
        logits = np.stack([random_logits(rng, vocab_size) for _ in range(batch)])
        prompts = rng.integers(0, vocab_size, (batch, 1 + vocab_size // 8))
        hosts = [Sampler(each, vocab_size, prompt) for each, prompt in zip(params, prompts)]
        noise = np.stack([host.noise(STEPS) for host in hosts])
        steps = rng.integers(0, STEPS, batch)
        for host, step, prompt in zip(hosts, steps, prompts):
            for _ in range(step):
                host.take(int(prompt[0]))
        seen = np.stack([np.zeros(vocab_size, bool) if host.seen is None else host.seen for host in hosts])
        out = run(logits, params, noise, steps, seen)
        for row, host in enumerate(hosts):
            expected, token = host.choose(logits[row])[0], int(out["tokens"][row, 0])
            if params[row].temperature > 0:
                exact, drawn = shares(logits[row], params[row], seen[row]), noise[row, steps[row]]
                ends = np.cumsum(exact)
                assert exact[token] > 0, params[row]
                assert ends[token] - exact[token] - TOLERANCE <= drawn <= ends[token] + TOLERANCE, params[row]
            else:
                assert token == expected, params[row]
            differing += token != expected
            total += 1
    assert differing <= 0.01 * total


def test_a_loop_of_steps_is_the_host_s():
    vocab_size, rng = 500, np.random.default_rng(1)
    params = [SamplingParams(temperature=t, repetition_penalty=p, seed=s) for t, p, s in [(0, 1.5, 0), (2, 1.3, 5)]]
    hosts = [Sampler(each, vocab_size, np.array([3, 4])) for each in params]
    noise, seen, steps = np.stack([h.noise(STEPS) for h in hosts]), np.stack([h.seen.copy() for h in hosts]), [0, 0]
    logits = rng.normal(size=(2, vocab_size)).astype(np.float32)  # the same each step: only penalty and noise change
    for _ in range(STEPS):
        out = run(logits, params, noise, steps, seen)
        seen, steps = out["next_seen"], out["next_steps"]
        assert out["tokens"][:, 0].tolist() == [host.choose(row)[0] for host, row in zip(hosts, logits)]
        assert (seen == [host.seen for host in hosts]).all()


FINE = [case for case in CASES if case["temperature"] > 0]


@pytest.mark.parametrize("case", FINE, ids=str)
@pytest.mark.parametrize("vocab_size", [20, 300])
def test_yields_the_distribution(case, vocab_size):
    """Noise on a grid gives each token its share: all tokens that the host has, no others, and as often."""
    params, rng, grid = SamplingParams(**case), np.random.default_rng(7), 1 << 11
    logits = rng.normal(size=vocab_size).astype(np.float32)
    logits[::9] = -np.inf
    seen = rng.random(vocab_size) < 0.3
    tokens = np.concatenate(
        [
            run(
                np.tile(logits, (1024, 1)),
                [params] * 1024,
                ((np.arange(1024, dtype=np.float32) + start + 0.5) / grid)[:, None],
                seen=np.tile(seen, (1024, 1)),
            )["tokens"][:, 0]
            for start in range(0, grid, 1024)
        ]
    )
    counts = np.bincount(tokens, minlength=vocab_size)
    exact = shares(logits, params, seen)
    assert (np.diff(tokens) >= 0).all()  # in the order of ids
    assert np.abs(counts - exact * grid).max() <= 1 + 2 * TOLERANCE * grid
    scores = (
        logits
        if params.repetition_penalty == 1
        else penalized(logits, np.flatnonzero(seen), case["repetition_penalty"])
    )
    ids, weights = distribution(scores, params)
    host = (np.arange(vocab_size) if ids is None else ids)[weights > 0]
    seldom = exact * grid < 2  # such a share may fall between two points of the grid
    assert set(np.flatnonzero(counts)) <= set(host)
    assert set(np.flatnonzero(counts)) >= set(host) - set(np.flatnonzero(seldom))


def test_ties():
    """Those at the border of top_k all stay, and those at that of top_p, on the host as well."""
    logits = np.array([[0, 2, 1, 2, 1, 1, -3]], np.float32)
    noise = (np.arange(256, dtype=np.float32)[:, None] + 0.5) / 256

    def found(**case):
        params = SamplingParams(temperature=1.0, **case)
        tokens = set(run(logits.repeat(256, 0), [params] * 256, noise)["tokens"].flatten().tolist())
        assert set(distribution(logits[0], params)[0]) == tokens
        return tokens

    assert found(top_k=3) == {1, 2, 3, 4, 5}
    assert found(top_k=1) == found(min_p=1.0) == found(top_p=0.1) == found(top_k=4, top_p=0.1) == {1, 3}
    assert found(top_p=0.7) == {1, 2, 3, 4, 5}
    assert run(logits)["tokens"].item() == 1


def test_small_differences():
    """A tiny temperature still weighs, and top_k tells apart what a high temperature brings close."""
    for temperature in (1e-6, 1e-30):
        logits = np.array([[0, temperature]], np.float32).repeat(2, 0)  # weights 1/e and 1: shares 0.27 and 0.73
        noise = np.array([[0.25], [0.29]], np.float32)
        assert run(logits, [SamplingParams(temperature=temperature)] * 2, noise)["tokens"].tolist() == [[0], [1]]
    logits = np.arange(200, dtype=np.float32)[None].repeat(64, 0) * 1e-7
    noise = (np.arange(64, dtype=np.float32)[:, None] + 0.5) / 64
    tokens = run(logits, [SamplingParams(temperature=100.0, top_k=5)] * 64, noise)["tokens"]
    assert set(tokens.flatten().tolist()) == {195, 196, 197, 198, 199}


def test_sums_of_another_order():
    """A parallel sum may rise over a token without a weight, or end below the noise: such a token is never taken."""
    g = GraphBuilder("test")
    weights, sums = (g.input(name, ir.DataType.FLOAT, ["B", 4]) for name in ("weights", "sums"))
    place = _first_past(g, weights, sums, g.input("rest", ir.DataType.FLOAT, ["B", 1]), 4)
    g.output(place, "place", ir.DataType.INT64, ["B", 1])
    feeds = {
        "weights": np.tile(np.float32([0.5, 0, 0.5, 0]), (5, 1)),
        "sums": np.tile(np.float32([0.5, 0.51, 1, 1.01]), (5, 1)),
        "rest": np.float32([[0], [0.5], [0.505], [1.005], [1.02]]),
    }
    here = onnxruntime.InferenceSession(ir.to_proto(g.model()).SerializeToString())
    assert here.run(None, feeds)[0].tolist() == [[0], [2], [2], [2], [2]]


@pytest.mark.parametrize("vocab_size", [97, 1024, 20_000])
@pytest.mark.parametrize("drawn", [0.0, np.nextafter(np.float32(1), np.float32(0))])
def test_the_ends_of_the_noise(vocab_size, drawn):
    """They are tokens with a weight, never masked ones or those that fill up the last block."""
    logits = np.random.default_rng(3).normal(size=(4, vocab_size)).astype(np.float32)
    logits[:, [0, 1, 2, -3, -2, -1]] = -np.inf
    params = [SamplingParams(temperature=t, top_k=k) for t, k in [(1, 0), (100, 0), (1, 5), (0.01, 2)]]
    tokens = run(logits, params, np.full((4, 1), drawn, np.float32))["tokens"][:, 0]
    for token, row, each in zip(tokens, logits, params):
        kept = np.flatnonzero(shares(row, each, None) > 1e-7)
        assert token == kept[-1 if drawn else 0]


@pytest.mark.parametrize("vocab_size", [97, 1000, 20_000])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 96, slice(None)])
def test_logits_that_are_not_numbers(vocab_size, bad, place):
    logits = np.random.default_rng(0).normal(size=(4, vocab_size)).astype(np.float32)
    params = [SamplingParams(temperature=t, top_k=5, top_p=0.9) for t in (1.0, 1.0, 0.0, 1.0)]
    noise = np.full((4, 1), 0.7, np.float32)
    good, good_greedy = run(logits, params, noise)["tokens"], run(logits)["tokens"]
    logits[1:3, place] = bad
    is_number = np.isneginf(bad) and place != slice(None)
    for out, before in ((run(logits, params, noise), good), (run(logits), good_greedy)):
        tokens = out["tokens"]
        assert (tokens[[0, 3]] == before[[0, 3]]).all() and (tokens[[0, 3]] >= 0).all()
        assert ((tokens[1:3] >= 0) if is_number else (tokens[1:3] == -1)).all()
        assert (out["next_ids"] == np.maximum(tokens, 0)).all()
        if "next_seen" in out:
            assert out["next_seen"].sum(1).tolist() == (tokens[:, 0] >= 0).tolist()
    if not is_number:
        with pytest.raises(UserError, match="not numbers"):
            Sampler(params[1], vocab_size, np.array([0])).choose(logits[1])


def test_an_overflow_by_the_penalty_is_no_number():
    logits, seen = np.array([[1e38, 0, 1]], np.float32), np.array([[True, False, False]])
    params = SamplingParams(temperature=1.0, repetition_penalty=0.1)
    assert run(logits, [params], np.zeros((1, 1), np.float32), seen=seen)["tokens"].item() == -1


def test_what_the_next_step_gets():
    logits = np.zeros((3, 40), np.float32)
    logits[[0, 1, 2], [7, 39, 0]] = 9
    params = [SamplingParams(temperature=t, top_k=1) for t in (0.0, 1.0, 1.0)]
    seen = np.zeros((3, 40), bool)
    seen[:, 5] = seen[0, 7] = True
    before = seen.copy()
    state = {"positions": [4, 10, 11], "last_rows": [100, 11, 11]}
    out = run(logits, params, np.zeros((3, STEPS), np.float32), [0, STEPS - 2, STEPS - 1], seen, **state)
    assert out["tokens"].tolist() == out["next_ids"].tolist() == [[7], [39], [0]]
    assert out["next_positions"].tolist() == [[5], [11], [11]]
    assert out["next_steps"].tolist() == [[1], [STEPS - 1], [STEPS - 1]]
    before[[0, 1, 2], [7, 39, 0]] = True
    assert (out["next_seen"] == before).all()
    greedy = run(logits, **state)
    assert greedy.keys() == {"tokens", "next_ids", "next_positions"}
    assert all((greedy[name] == out[name]).all() for name in greedy)


def test_greedy_is_argmax():
    logits = np.random.default_rng(5).integers(-9, 9, (4, 1000)).astype(np.float32)  # with ties: the first
    assert run(logits)["tokens"][:, 0].tolist() == logits.argmax(1).tolist()


@pytest.mark.parametrize("greedy_only", [True, False])
@pytest.mark.parametrize("vocab_size", [5, 97, 1024])
def test_is_standard_onnx_that_tensorrt_builds(vocab_size, greedy_only):
    model = ir.to_proto(write_sampler(vocab_size, greedy_only))
    onnx.checker.check_model(model, full_check=True)
    assert lint_model(model) == []
    assert {node.domain for node in model.graph.node} == {""} and model.opset_import[0].version == 24
    shapes = {
        each.name: [dim.dim_param or dim.dim_value for dim in each.type.tensor_type.shape.dim]
        for each in model.graph.input
    }
    profile = {
        name: tuple(tuple({"B": batch, "N": STEPS}.get(dim, dim) for dim in shape) for batch in (1, 2, 4))
        for name, shape in shapes.items()
    }
    plan, reason = trt_probe.build(model, profile)
    assert plan, reason
