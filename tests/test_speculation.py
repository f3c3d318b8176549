"""Drafts and what becomes of them: the tokens are those of one step each, in fewer steps."""

import numpy as np
import pytest
import test_scheduler
from test_scheduler import VOCAB, make, prompts_of

from llmtrt.runtime.params import SamplingParams
from llmtrt.runtime.request import Request
from llmtrt.runtime.speculation import NOTHING, Draft, PromptLookup, Speculation


def copying_logits(sequence):
    """A model that mostly says what followed the last time that its last token came, else something among 40 tokens."""
    sequence = list(sequence)
    logits = np.random.default_rng(sum((place + 1) * token for place, token in enumerate(sequence))).normal(size=VOCAB)
    logits[300:340] += 3
    for place in range(len(sequence) - 1, 0, -1):
        if sequence[place - 1] == sequence[-1]:
            logits[sequence[place]] += 4
            break
    return logits.astype(np.float32)


@pytest.fixture
def copying(monkeypatch):
    monkeypatch.setattr(test_scheduler, "logits_after", copying_logits)


SIZES = (2, 4, 8, 16)


class Eager(Speculation):
    """Times that make every row free, so that all drafts are tried."""

    def measured(self, sequences, rows, seconds):
        for _ in range(2):
            super().measured(sequences, rows, 1.0)


PARAMS = {
    "greedy": SamplingParams(max_tokens=40, ignore_eos=True),
    "sampled": SamplingParams(max_tokens=40, temperature=0.7, seed=3, ignore_eos=True),
    "penalized": SamplingParams(max_tokens=40, temperature=0.9, top_p=0.9, repetition_penalty=1.1, seed=5),
    "logprobs": SamplingParams(max_tokens=40, ignore_eos=True, logprobs=2),
}


@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_are_those_of_one_step_each(tmp_path, copying, name, batch):
    prompts = [[*prompt, *prompt[:4]] for prompt in prompts_of([14, 9, 12, 20])]
    plain = make(tmp_path, chunk=16, max_seq=64, max_batch=batch)
    speculation = Eager()
    fast = make(tmp_path, chunk=16, max_seq=64, max_batch=batch, speculation=speculation)
    expected = plain.generate(prompts, PARAMS[name])
    done = fast.generate(prompts, PARAMS[name])
    assert [each.token_ids for each in done] == [each.token_ids for each in expected]
    assert [each.logprobs for each in done] == [each.logprobs for each in expected]
    assert [each.finish_reason for each in done] == [each.finish_reason for each in expected]
    assert 0 < speculation.accepted < speculation.drafted
    assert len(fast._session.steps) < len(plain._session.steps)


@pytest.mark.parametrize("left", [1, 2, 3, 7])
def test_no_more_than_is_wanted_is_drafted(tmp_path, copying, left):
    (prompt,) = prompts_of([6])
    llm = make(tmp_path, chunk=16, speculation=(speculation := Eager()))
    done = llm.generate([*prompt, *prompt, *prompt[:3]], SamplingParams(max_tokens=3 + left, ignore_eos=True))
    assert len(done.token_ids) == 3 + left and done.finish_reason == "length"
    assert speculation.drafted < 3 + left
    assert {rows for _, _, rows in llm._session.steps[1:]} <= {1, 2, 4, 8, 16}  # a shape costs the first time


def test_a_stop_within_a_draft_ends_the_answer(tmp_path, copying):
    (prompt,) = prompts_of([8])
    prompt = [*prompt, *prompt, *prompt[:3]]
    free = make(tmp_path).generate(prompt, SamplingParams(max_tokens=12, ignore_eos=True)).token_ids
    for stop in free:
        asked = SamplingParams(max_tokens=12, ignore_eos=True, stop_token_ids=[stop])
        done = make(tmp_path, chunk=16, speculation=Eager()).generate(prompt, asked)
        assert done.token_ids == free[: free.index(stop) + 1] and done.finish_reason == "stop"


def test_the_next_turn_begins_with_what_is_right_alone(tmp_path, copying):
    """Rows of drafts that were wrong lie in the cache behind those that count."""
    (prompt,) = prompts_of([12])
    prompt = [*prompt, *prompt[:5]]
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    fast, plain = make(tmp_path, chunk=16, speculation=Eager()), make(tmp_path, chunk=16)
    first = fast.generate(prompt, params)
    longer = [*prompt, *first.token_ids, 300]
    fast._session.steps.clear()
    assert fast.generate(longer, params).token_ids == plain.generate(longer, params).token_ids
    assert fast._session.steps[0] == (0, 1, 2)


@pytest.mark.parametrize(
    "tokens, expected",
    [
        ([1, 2, 3, 4, 1, 2], ((3, 4, 1, 2, 3), 2)),
        ([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], ((9, 2, 3, 8, 1), 3)),  # the longer match counts, not the later
        ([5, 6, 7, 5, 6, 8, 5, 6], ((8, 5, 6, 8, 5), 2)),  # of equal ones the later
        ([4, 4, 4], ((4, 4, 4, 4, 4), 2)),
        ([1, 2, 3], ((), None)),
        ([1], ((), None)),
    ],
)
def test_prompt_lookup(tokens, expected):
    draft = PromptLookup().draft(tokens, 5)
    assert (tuple(draft.tokens), draft.kind) == expected
    grown = PromptLookup()  # the same, told token by token
    for size in range(1, len(tokens)):
        grown.draft(tokens[:size], 5)
    assert grown.draft(tokens, 5) == draft
    assert PromptLookup(longest=3, shortest=3).draft([1, 2, 9, 1, 2], 4) == NOTHING


def request(prompt, most=1000):
    spec = test_scheduler.spec(max_seq=5000)
    return Request(0, np.array(prompt), SamplingParams(max_tokens=most), spec, 5000, None, 0.0)


def play(speculation, cost, right, steps, extra=lambda step, rows: 0.0, told=True, kind=lambda: "any", sizes=SIZES):
    """Steps of one request whose drafts never end, of each: its rows, tokens and seconds. ``right(tokens)``: whether one
    more of a draft's tokens is right, behind so many; ``extra(step, rows)``: seconds beside the ``cost`` of a step by its
    rows, which it does not measure; ``told``: whether it hears of the time that goes by; ``kind()``: that of a draft."""
    one = request([1, 2, 3, 1, 2, 3], most=100_000)
    speculation._draft = lambda each, most: Draft([0] * most, kind()) if most > 0 else NOTHING
    tokens = 0
    for step in range(steps):
        rows, (draft,) = (1, [NOTHING]) if speculation.rests() else speculation.drafts([one], sizes)
        speculation.measured(1, rows, cost(rows))
        accepted = 0
        while accepted < len(draft.tokens) and right(tokens):
            accepted += 1
        if draft.tokens:
            speculation.verified(draft, accepted)
        seconds = cost(rows) + extra(step, rows)
        if told:
            speculation.gave(1, 1 + accepted, seconds)
        tokens += 1 + accepted
        yield rows, 1 + accepted, seconds


def simulate(cost, share, steps=3000, seed=0, sizes=SIZES):
    """Tokens a second of a request whose drafts are right with probability ``share``, against one row a step; ``cost``:
    seconds of a step by its rows."""
    rng = np.random.default_rng(seed)
    played = list(play(Speculation(), cost, lambda tokens: rng.random() < share(tokens), steps, sizes=sizes))
    _, tokens, seconds = map(sum, zip(*played))
    return tokens / seconds * cost(1)


# The last is what TensorRT's INT4 kernels cost.
COSTS = {
    "cheap rows": lambda rows: 1 + 0.01 * rows,
    "dear rows": lambda rows: float(rows),
    "as TensorRT": lambda rows: {1: 30, 2: 42, 4: 43, 8: 43, 16: 35}[rows],
}


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("sizes", [SIZES, (4, 16), (4,)], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_it_is_never_slower_by_much_and_faster_where_it_can_be(name, share, sizes):
    cost = COSTS[name]
    ratio = simulate(cost, lambda _: share, sizes=sizes)
    best = max((1 - share**rows) / (1 - share) / cost(rows) * cost(1) for rows in (1, *sizes))
    assert ratio > 0.97 and ratio > 0.9 * best


def test_it_notices_that_drafts_have_become_right():
    """None are for 1000 tokens, most are for the next: the rest between trials must not outlast that."""
    before = simulate(COSTS["as TensorRT"], lambda tokens: 0.02, steps=1000)
    after = simulate(COSTS["as TensorRT"], lambda tokens: 0.02 if tokens < 1000 else 0.95, steps=1500)
    assert 0.97 < before < 1.0 and after > 2


def test_a_kind_that_does_not_pay_does_not_stop_another():
    cost, rng = COSTS["as TensorRT"], np.random.default_rng(0)
    share, now = {"good": 0.95, "bad": 0.02}, []

    def kind():
        now[:] = rng.choice([*share], 1)
        return now[0]

    played = play(Speculation(), cost, lambda _: rng.random() < share[now[0]], 3000, kind=kind)
    _, tokens, seconds = map(sum, zip(*played))
    best = ((1 - 0.95**16) / 0.05 + 1) / (cost(16) + cost(1))
    assert tokens / seconds > 0.9 * best


def test_a_first_step_that_compiles_does_not_count():
    speculation = Speculation()
    for seconds in (9.0, 1.0, 1.0, 1.0):
        speculation.measured(1, 1, seconds)
    one = request([1, 2, 3, 1, 2])
    _, (draft,) = speculation.drafts([one], SIZES)
    assert len(draft.tokens) == 1
    speculation.measured(1, 2, 60.0)
    assert len(speculation.drafts([one], SIZES)[1][0].tokens) == 1  # not known yet
    speculation.measured(1, 2, 1.0)
    assert len(speculation.drafts([one], SIZES)[1][0].tokens) == 3
    for _ in range(2):
        speculation.measured(1, 4, 1.9)  # for 1.875 tokens, where two rows give 1.5 in one
    assert len(speculation.drafts([one], SIZES)[1][0].tokens) == 1


def test_other_drafters_are_asked_for_each_request(tmp_path, copying):
    """An interface that a draft model can use: here one that knows the answer."""
    (prompt,) = prompts_of([10])
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    answer = make(tmp_path).generate(prompt, params).token_ids

    class Knowing:
        def draft(self, token_ids, most):
            return Draft(answer[len(token_ids) - len(prompt) :][:most], "oracle")

    llm = make(tmp_path, chunk=16, speculation=Eager(Knowing))
    assert llm.generate(prompt, params).token_ids == answer
    assert [rows for _, _, rows in llm._session.steps[1:]][-2:] == [4, 8]


@pytest.mark.parametrize("name, share, rows", [("cheap rows", 0.9, 4), ("as TensorRT", 0.9, 4), ("dear rows", 0.05, 1)])
def test_one_slow_step_is_not_remembered_for_good(name, share, rows):
    seen = {}

    def cost(size):
        seen[size] = seen.get(size, 0) + 1
        return COSTS[name](size) * (10 if size == rows and seen[size] == 2 else 1)

    assert simulate(cost, lambda _: share, steps=6000) > 0.9 * simulate(COSTS[name], lambda _: share, steps=6000)


def test_nothing_is_kept_of_streams_that_were_left(tmp_path, copying):
    speculation = Eager()
    llm = make(tmp_path, speculation=speculation)
    for prompt in prompts_of([5] * 20):
        stream = llm.generate_stream(prompt)
        next(stream), next(stream), next(stream)
    stream.close()
    assert not speculation._known


def test_a_cancelled_request_gives_no_more_of_its_draft(tmp_path, copying):
    (prompt,) = prompts_of([6])
    llm = make(tmp_path, chunk=16, speculation=Eager())
    stream = llm.generate_stream([*prompt, *prompt, *prompt[:3]], SamplingParams(max_tokens=40, ignore_eos=True))
    while llm._session.steps[-1:] != [(0, 1, 16)] or len(llm._session.steps) == 1:
        next(stream)
    stream.cancel()
    assert [piece.finish_reason for piece in stream] == ["cancelled"]


def test_a_pause_does_not_switch_off_what_pays():
    """Whoever reads the tokens was away for as long as 100 steps, behind each 50."""
    rng = np.random.default_rng(0)
    right, pause = (lambda _: rng.random() < 0.8), (lambda step, _: 100 * (step % 50 == 49))
    played = play(Speculation(), COSTS["cheap rows"], right, 1000, pause)
    assert sum(rows > 1 for rows, _, _ in played) > 900


def test_what_costs_more_than_its_steps_say_is_left_off():
    """Drafts that promise 1.6 times the tokens, where going from one kind of step to the other takes as long as two."""
    cost = COSTS["cheap rows"]

    def played(steps, told):
        rng = np.random.default_rng(0)
        right, change = (lambda _: rng.random() < 0.4), (lambda _, rows: 2 * (rows > 1))
        return list(play(Speculation(), cost, right, steps, change, told))

    found = played(2000, told=True)
    _, tokens, seconds = map(sum, zip(*found))
    assert tokens / seconds * cost(1) > 0.9 and sum(rows > 1 for rows, _, _ in found[1001:]) < 60
    assert sum(rows > 1 for rows, _, _ in played(200, told=False)) > 100  # it is the time that went by that says so
