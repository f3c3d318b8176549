"""The host sampler against transformers' logits processors in float64, and its noise against the distribution."""

import numpy as np
import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmtrt.errors import UserError
from llmtrt.runtime import sampling
from llmtrt.runtime.params import SamplingParams
from llmtrt.runtime.sampling import Sampler, distribution, penalized, token_logprob

CASES = [
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 3.0, "top_p": 0.95},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.3, "top_k": 40},
    {"temperature": 1.0, "top_k": 100_000},
    {"temperature": 0.9, "top_p": 0.5},
    {"temperature": 5.0, "top_p": 0.999},  # the candidates that are tried first do not reach it
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 2.0, "min_p": 1.0},
    {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.1, "top_k": 30, "top_p": 0.8, "repetition_penalty": 1.4},
    {"temperature": 1.0, "repetition_penalty": 0.7},
]


def transformers_probabilities(logits, seen, params):
    chain = LogitsProcessorList()
    if params.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    chain.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(MinPLogitsWarper(params.min_p))
    return chain(torch.tensor(seen)[None], torch.tensor(logits)[None]).softmax(-1)[0].numpy()


def our_probabilities(logits, seen, params):
    scores = penalized(logits, np.unique(seen), params.repetition_penalty) if params.repetition_penalty != 1 else logits
    ids, weights = distribution(scores, params)
    result = np.zeros(len(logits), logits.dtype)
    result[slice(None) if ids is None else ids] = weights / weights.sum()
    return result


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("vocabulary", [7, 3000, 50_000])
def test_distribution_is_that_of_transformers(case, vocabulary):
    params = SamplingParams(**case)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        logits = rng.normal(size=vocabulary) * 4
        seen = rng.integers(0, vocabulary, 20)
        before = logits.copy()
        ours, theirs = (f(logits, seen, params) for f in (our_probabilities, transformers_probabilities))
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-15)
        assert ((ours > 0) == (theirs > 0)).all()
        assert (logits == before).all()


def test_greedy_and_penalty():
    logits = np.array([1.0, 3.0, 2.9, -1.0], np.float32)
    assert Sampler(SamplingParams(), 4, np.array([1])).choose(logits)[0] == 1
    sampler = Sampler(SamplingParams(repetition_penalty=1.5), 4, np.array([1, 1]))
    assert [sampler.choose(logits)[0] for _ in range(3)] == [
        2,
        1,
        1,
    ]  # 3/1.5 < 2.9; then 2.9/1.5 < 3/1.5, each penalized once
    assert logits.tolist() == np.array([1.0, 3.0, 2.9, -1.0], np.float32).tolist()


def test_samples_follow_the_distribution():
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    sampler = Sampler(SamplingParams(temperature=1.0, seed=11), 4, np.array([0]))
    counts = np.bincount([sampler.choose(logits)[0] for _ in range(8000)], minlength=4)
    expected = np.array([0.5, 0.25, 0.125, 0.125]) * 8000
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


def test_seeds():
    logits = np.random.default_rng(0).normal(size=1000).astype(np.float32)

    def run(seed):
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), 1000, np.array([0]))
        return [sampler.choose(logits)[0] for _ in range(10)]

    assert run(7) == run(7) != run(8)
    assert len(set(run(7))) > 5  # each step has noise of its own
    assert run((1 << 64) - 1) == run((1 << 64) - 1)
    assert run(None) != run(None)


@pytest.mark.parametrize("ahead", [1, 30, 256])
@pytest.mark.parametrize("seed", [0, 7, (1 << 64) - 1])
def test_noise_is_one_stream_a_seed(monkeypatch, seed, ahead):
    monkeypatch.setattr(sampling, "_AHEAD", ahead)
    stream = np.random.Generator(np.random.Philox(key=seed)).random(40).astype(np.float32)
    sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), 8, np.array([0]))
    for step in range(12):
        noise = sampler.noise(28)
        assert noise.dtype == np.float32 and (noise == stream[step : step + 28]).all()
        if step % 3:
            sampler.take(5)
        else:  # equal logits share the noise equally
            assert sampler.choose(np.zeros(8, np.float32))[0] == int(noise[0] * 8)


def test_noise_stays_below_1(monkeypatch):
    class Highest:
        def __init__(self, bits):
            pass

        def random(self, count):
            return np.full(count, 1 - 2.0**-53)

    monkeypatch.setattr(np.random, "Generator", Highest)
    sampler = Sampler(SamplingParams(temperature=1.0), 3, np.array([0]))
    assert sampler.noise(2).tolist() == [1 - 2.0**-24] * 2
    assert sampler.choose(np.array([1, 1, -np.inf], np.float32))[0] == 1


def test_tokens_chosen_elsewhere():
    assert Sampler(SamplingParams(), 4, np.array([1])).seen is None
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), 4, np.array([1]))
    sampler.take(2)
    assert sampler.seen.tolist() == [False, True, True, False]
    assert sampler.choose(np.array([2, 3, 3, 1.9], np.float32))[0] == 0
    with pytest.raises(UserError, match="not numbers"):
        sampler.take(-1)
    assert sampler.seen.tolist() == [True, True, True, False]


@pytest.mark.parametrize("temperature", [1e-30, 1e-5, 1e30])
def test_extreme_temperatures(temperature):
    logits = np.array([1.0, 5.0, 4.0, -np.inf], np.float32)
    sampler = Sampler(SamplingParams(temperature=temperature, seed=0), 4, np.array([0]))
    tokens = {sampler.choose(logits)[0] for _ in range(200)}
    assert tokens == ({1} if temperature < 1 else {0, 1, 2})  # a masked token never comes
    assert {Sampler(SamplingParams(temperature=1.0, top_p=1e-6), 4, np.array([0])).choose(logits)[0]} == {1}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("case", [{}, *CASES], ids=str)
def test_logits_that_are_no_numbers(bad, case):
    logits = np.array([0.0, bad, 1.0], np.float32)
    with pytest.raises(UserError, match="overflow"):
        Sampler(SamplingParams(**case), 3, np.array([0])).choose(logits)


def test_logprobs_against_torch():
    logits = (np.random.default_rng(3).normal(size=5000) * 10).astype(np.float32)
    expected = torch.tensor(logits, dtype=torch.float64).log_softmax(-1)
    entry = token_logprob(logits, 17, 5)
    assert entry.logprob == pytest.approx(float(expected[17]), abs=1e-5)
    values, ids = expected.topk(5)
    assert [index for index, _ in entry.top] == ids.tolist()
    assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert token_logprob(logits, 17, 0).top == ()
    assert len(token_logprob(logits[:3], 1, 20).top) == 3


@pytest.mark.parametrize(
    ("generation", "overrides", "expected"),
    [
        ({}, {}, SamplingParams()),
        ({"temperature": 0.6, "top_p": 0.9}, {}, SamplingParams()),  # no do_sample: greedy
        ({"do_sample": True}, {}, SamplingParams(temperature=1.0, top_k=50)),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 0},
            {},
            SamplingParams(temperature=0.6, top_p=0.9),
        ),
        ({"do_sample": True, "temperature": 0.6}, {"temperature": 0.0}, SamplingParams()),
        ({"top_k": 7}, {"temperature": 0.5}, SamplingParams(temperature=0.5, top_k=7)),
        ({"do_sample": True, "top_k": 7}, {"top_k": 0, "seed": None}, SamplingParams(temperature=1.0)),
        ({"repetition_penalty": 1.1, "max_new_tokens": 9}, {}, SamplingParams(repetition_penalty=1.1, max_tokens=9)),
        ({"do_sample": True, "temperature": -3}, {"temperature": 0.0}, SamplingParams()),
    ],
)
def test_generation_config(generation, overrides, expected):
    assert SamplingParams.from_generation(generation, **overrides) == expected


def test_defaults_are_those_of_transformers():
    """What ``generate`` fills in where a generation_config.json is silent."""
    ours = SamplingParams.from_generation({"do_sample": True})
    theirs = GenerationConfig._get_default_generation_params()
    assert (ours.temperature, ours.top_k, ours.top_p, ours.repetition_penalty) == tuple(
        theirs[name] for name in ("temperature", "top_k", "top_p", "repetition_penalty")
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0), ("max_tokens", 1.5), ("temperature", -0.1), ("temperature", float("nan")),
        ("temperature", "hot"),
        ("temperature", float("inf")), ("top_k", -1), ("top_k", True), ("top_p", 0), ("top_p", 1.1),
        ("min_p", -1), ("min_p", 2),
        ("repetition_penalty", 0), ("repetition_penalty", 1e-40), ("temperature", 1e39),
        ("seed", -1), ("seed", 1 << 64), ("stop", [""]), ("stop", [3]), ("stop", 3),
        ("stop_token_ids", ["a"]), ("stop_token_ids", [-1]), ("logprobs", -1), ("logprobs", 5000), ("ignore_eos", 1),
    ],
)  # fmt: skip
def test_parameters_out_of_range(name, value):
    with pytest.raises(UserError, match=name):
        SamplingParams(**{name: value})


def test_unknown_override():
    with pytest.raises(UserError, match="beams is no sampling parameter"):
        SamplingParams.from_generation({}, beams=4)


def test_one_stop_string_needs_no_list():
    assert SamplingParams(stop="END").stop == ("END",)
