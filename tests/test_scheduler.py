"""The scheduler, LLM and its limits over a session that remembers exactly what it was told."""

import hashlib
import shutil
import time

import numpy as np
import pytest
import samples

from llmtrt.errors import UserError
from llmtrt.package import ModelSpec
from llmtrt.runtime.llm import LLM
from llmtrt.runtime.load import Loaded
from llmtrt.runtime.params import SamplingParams

VOCAB, EOS = 512, 2
UNWRITTEN = -1


def spec(max_seq=64, eos=(EOS,)):
    return ModelSpec("fake", 1, 1, 8, VOCAB, max_seq, "float32", "float32", 1, eos)


def logits_after(sequence):
    """The model: logits [V] that depend on every token and on the order of all."""
    digest = hashlib.sha256(np.asarray(sequence, np.int64).tobytes()).digest()
    logits = np.random.default_rng(int.from_bytes(digest[:8], "little")).normal(size=VOCAB).astype(np.float32) * 4
    logits[3:259] -= 50  # the tokenizer's bytes, which rarely join to UTF-8
    return logits


def greedy(prompt, count, eos=(EOS,)):
    """What the model says alone, without cache, chunk or batch."""
    out = []
    while len(out) < count:
        out.append(int(logits_after(list(prompt) + out).argmax()))
        if out[-1] in eos:
            break
    return out


class FakeSession:
    """A KV cache of token ids: a row's logits come from the cache up to its position, as attention would see it."""

    description = "fake"

    def __init__(self, chunk, spec):
        self.spec, self.chunk, self.steps, self.closed = spec, chunk, [], False
        self.reserved, self.copies = [], []
        self.cache = np.empty((0, 0), int)

    def reserve(self, slots, max_seq, keep=()):
        self.reserved.append((slots, max_seq))
        rows = max_seq + self.chunk
        if any(keep) and slots <= len(self.cache) and rows <= self.cache.shape[1]:
            return len(self.cache)
        old = self.cache
        if any(keep):
            slots, rows = max(slots, len(old)), max(rows, old.shape[1])
        self.cache = np.full((slots, rows), UNWRITTEN)
        kept = min(len(old), len(keep)) if any(keep) else 0
        for slot in range(kept):
            self.cache[slot, : keep[slot]] = old[slot, : keep[slot]]
        return kept

    def step(self, input_ids, positions, logits_index, first=0):
        slots, rows = input_ids.shape
        assert input_ids.dtype == positions.dtype == logits_index.dtype == np.int64
        assert first + slots <= len(self.cache) and positions.shape == (slots, rows)
        assert logits_index.shape[0] == slots
        assert 1 <= rows <= self.chunk
        assert (np.diff(positions, axis=1) == 1).all()
        assert positions.min() >= 0 and positions.max() < self.cache.shape[1], "ONNX Runtime raises, TensorRT drops"
        assert 0 <= logits_index.min() and logits_index.max() < rows
        self.steps.append((first, slots, rows))
        cache = self.cache[first : first + slots]
        np.put_along_axis(cache, positions, input_ids, 1)
        out = np.empty((*logits_index.shape, VOCAB), np.float32)
        for slot in range(slots):
            for place, row in enumerate(logits_index[slot]):
                seen = cache[slot, : positions[slot, row] + 1]
                out[slot, place] = np.nan if (seen == UNWRITTEN).any() else logits_after(seen)
        return out

    def copy_rows(self, source, target, rows):
        self.copies.append((source, target, rows))
        self.cache[target, :rows] = self.cache[source, :rows]

    def clear_rows(self, slot, start):
        self.cache[slot, start:] = UNWRITTEN

    def close(self):
        self.closed = True


@pytest.fixture
def llm(tmp_path):
    return make(tmp_path)


def make(folder, chunk=7, generation=None, max_batch=4, max_seq=None, reuse_prefixes=True, speculation=None, **fields):
    session = FakeSession(chunk, spec(max_seq=max(max_seq or 0, 64), **fields))
    return LLM.from_loaded(Loaded(session, folder, generation or {}), max_batch, max_seq, reuse_prefixes, speculation)


def with_tokenizer(folder, **options):
    shutil.copy(samples.stories260k() / "tokenizer.json", folder)
    return make(folder, **options)


def prompts_of(lengths):
    rng = np.random.default_rng(5)
    return [rng.integers(3, VOCAB, length).tolist() for length in lengths]


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
@pytest.mark.parametrize("length", [1, 6, 7, 8, 14, 30])
def test_chunked_prefill_and_decode_are_the_model(tmp_path, chunk, length):
    (prompt,) = prompts_of([length])
    done = make(tmp_path, chunk).generate(prompt, SamplingParams(max_tokens=20))
    assert done.token_ids == greedy(prompt, 20)
    assert done.prompt_tokens == length and done.text == ""


@pytest.mark.parametrize("lengths", [(1, 30), (30, 1), (7, 8, 14, 15), (3, 3), (21, 2, 20, 5, 1, 30, 6)])
@pytest.mark.parametrize("chunk", [3, 7, 64])
def test_many_prompts_of_different_lengths(tmp_path, chunk, lengths):
    prompts = prompts_of(lengths)
    params = [SamplingParams(max_tokens=1 + 5 * (index % 5)) for index in range(len(prompts))]
    done = make(tmp_path, chunk).generate(prompts, params)
    assert [each.token_ids for each in done] == [greedy(p, q.max_tokens) for p, q in zip(prompts, params)]


def test_memory_is_reserved_for_what_is_asked(llm):
    llm.generate(prompts_of([5, 9, 2, 2, 2]), SamplingParams(max_tokens=10))
    llm.generate(prompts_of([40]), SamplingParams(max_tokens=None))
    assert llm._session.reserved == [(4, 19), (1, 64)]


def test_prefill_and_decode_steps(llm):
    done = llm.generate(prompts_of([16, 3]), SamplingParams(max_tokens=5, ignore_eos=True))
    # Three rows of each, which is all of the second; then the first's chunks between steps of both.
    assert (
        llm._session.steps
        == [(0, 2, 3), (0, 2, 1)] + [(0, 1, 7), (0, 2, 1)] + [(0, 1, 6)] + [(0, 2, 1)] * 2 + [(0, 1, 1)] * 2
    )
    assert [each.finish_reason for each in done] == ["length"] * 2


@pytest.mark.parametrize("reuse", [True, False])
def test_a_finished_requests_slot_is_refilled_while_the_others_go_on(tmp_path, reuse):
    rng = np.random.default_rng(3)
    prompts = prompts_of(rng.integers(1, 25, 20))
    params = [SamplingParams(max_tokens=int(count), ignore_eos=True) for count in rng.integers(1, 30, 20)]
    llm = make(tmp_path, chunk=64, max_batch=3, reuse_prefixes=reuse)
    order = [piece.index for piece in llm.generate_stream(prompts, params) if piece.completion]
    done = llm.generate(prompts, params)
    assert [each.token_ids for each in done] == [greedy(p, q.max_tokens, ()) for p, q in zip(prompts, params)]
    assert sorted(order) == [*range(20)] and order != [*range(20)]
    decoding = [slots for _, slots, rows in llm._session.steps if rows == 1]
    # In turns of three, each turn would take its longest: more steps than there are now.
    turns = sum(max(each.max_tokens for each in params[start : start + 3]) for start in range(0, 20, 3))
    assert len(decoding) / 2 < 0.85 * turns


def test_nobody_waits_for_a_long_prompt(tmp_path):
    """Between two tokens of one that answers lies one chunk of the other's prompt at most."""
    prompts = prompts_of([3, 60])
    llm = make(tmp_path, chunk=4, max_batch=2)
    stream = llm.generate_stream(prompts, SamplingParams(max_tokens=20, ignore_eos=True))
    seen = []
    for piece in stream:
        if piece.index == 0:
            seen.append(len(llm._session.steps))
    assert max(np.diff(seen)) == 2 and min(np.diff(seen)) == 1 and len(seen) == 20


def test_prompts_are_prefilled_in_the_order_of_their_turn(tmp_path):
    """A long one in a later slot is not put off by short ones that come and go in the first."""
    prompts = prompts_of([2, 40] + [6] * 12)
    llm = make(tmp_path, chunk=4, max_batch=2)
    ends = []
    for piece in llm.generate_stream(prompts, SamplingParams(max_tokens=2, ignore_eos=True)):
        if piece.completion:
            ends.append(piece.index)
    assert ends[:2] == [0, 1]


@pytest.mark.parametrize("index, after", [(0, 1), (1, 0), (2, 0), (3, 0), (4, 3)])
def test_one_of_many_is_cancelled(tmp_path, index, after):
    """While it decodes, is prefilled, waits, and has ended: the others do not notice, and its slot is free."""
    prompts = prompts_of([3, 60, 4, 5, 6])
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (30, 4, 3, 2, 1)]
    llm = with_tokenizer(tmp_path, chunk=4, max_batch=3)
    whole = llm.generate(prompts, params)
    stream, pieces = llm.generate_stream(prompts, params), []
    for piece in stream:
        pieces.append(piece)
        if len(pieces) == 1 + after:
            stream.cancel(index)
    done = {piece.index: piece.completion for piece in pieces if piece.completion}
    assert len(done) == 5 and sum(piece.completion is not None for piece in pieces) == 5
    for place in {*range(5)} - {index}:
        assert done[place].token_ids == whole[place].token_ids
    cancelled = done[index]
    assert cancelled.finish_reason == "cancelled"
    assert cancelled.token_ids == whole[index].token_ids[: len(cancelled.token_ids)] != whole[index].token_ids
    assert cancelled.text == "".join(piece.text for piece in pieces if piece.index == index)
    assert (cancelled.ttft is None) == (not cancelled.token_ids) and pieces[-1].index != index
    stream.cancel(index)  # it has ended
    with pytest.raises(UserError, match="no prompt 5 to cancel: the call has 5"):
        stream.cancel(5)


@pytest.mark.parametrize("logprobs", [None, 0])
@pytest.mark.parametrize("after, left", [(1, 3), (3, 1)])
def test_no_token_comes_behind_a_cancel(tmp_path, logprobs, after, left):
    """Not one of the step whose other tokens have come, even if it was the last one."""
    params = SamplingParams(max_tokens=after + left, ignore_eos=True, logprobs=logprobs)
    stream, tokens = make(tmp_path, max_batch=2).generate_stream(prompts_of([3, 3]), params), 0
    for piece in stream:
        tokens += piece.index == 0
        if tokens == after + 1:
            stream.cancel(1)
            break
    rest = [piece for piece in stream if piece.index == 1]
    assert [piece.token_id for piece in rest] == [None] and rest[0].completion.finish_reason == "cancelled"
    assert len(rest[0].completion.token_ids) == after


def test_a_closed_stream_has_no_more(llm):
    stream = llm.generate_stream(prompts_of([3, 5]), SamplingParams(max_tokens=9, ignore_eos=True))
    next(stream)
    stream.close()
    steps = len(llm._session.steps)
    assert [*stream] == [] and len(llm._session.steps) == steps


def test_the_next_turn_is_computed_from_where_it_differs(tmp_path):
    (prompt,), params = prompts_of([20]), SamplingParams(max_tokens=8, ignore_eos=True)
    llm = make(tmp_path, chunk=64)
    first = llm.generate(prompt, params)
    longer = [*prompt, *first.token_ids, 300, 301]
    llm._session.steps.clear()
    assert llm.generate(longer, params).token_ids == greedy(longer, 8, ())
    # 20 of the prompt and 7 of the answer are in the cache: the eighth was the last, and never ran.
    assert llm._session.steps[0] == (0, 1, 3)
    llm._session.steps.clear()
    assert llm.generate(longer, params).token_ids == greedy(longer, 8, ())
    assert llm._session.steps[0] == (0, 1, 1)  # its last token runs again: somebody wants its logits
    other = [*longer[:10], 5, *longer[10:]]
    llm._session.steps.clear()
    assert llm.generate(other, params).token_ids == greedy(other, 8, ())
    assert llm._session.steps[0] == (0, 1, len(other) - 10)
    llm.logits(prompt)  # takes the cache
    llm._session.steps.clear()
    llm.generate(other, params)
    assert llm._session.steps[0] == (0, 1, len(other))
    cold = make(tmp_path, chunk=64, reuse_prefixes=False)
    for _ in range(2):
        cold._session.steps.clear()
        assert cold.generate(other, params).token_ids == greedy(other, 8, ())
        assert cold._session.steps[0] == (0, 1, len(other))


def test_a_shared_prompt_is_prefilled_once(tmp_path):
    """Of four that begin with the same 80 tokens, three wait for the first's and take a copy of its rows."""
    (system,) = prompts_of([80])
    prompts = [[*system, *end] for end in prompts_of([5, 3, 1, 9])]
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    llm = make(tmp_path, chunk=16, max_seq=128)
    done = llm.generate(prompts, params)
    assert [each.token_ids for each in done] == [greedy(prompt, 6, ()) for prompt in prompts]
    assert [rows for _, _, rows in llm._session.copies] == [80] * 3
    assert sum(slots * rows for _, slots, rows in llm._session.steps if rows > 1) < 80 + 16 + 3 * 9
    # All begin anew, each where it was: nothing is copied, and one row of each is computed.
    llm._session.copies.clear(), llm._session.steps.clear()
    assert [each.token_ids for each in llm.generate(prompts, params)] == [each.token_ids for each in done]
    assert llm._session.copies == [] and llm._session.steps[0] == (0, 4, 1)


def test_what_is_remembered_survives_requests_that_need_more_room(tmp_path):
    (prompt,), params = prompts_of([30]), SamplingParams(max_tokens=4, ignore_eos=True)
    llm = make(tmp_path, chunk=32, max_seq=64)
    llm.generate(prompt, params)
    llm._session.steps.clear()
    longer = [*prompt, *prompts_of([20])[0]]
    llm.generate(longer, params)  # the cache grows in length
    assert llm._session.steps[0] == (0, 1, 20)
    llm.generate([longer, [7]], params)  # and in slots
    assert llm._session.steps[4] == (0, 2, 1)


def test_slots_that_nobody_has_cost_nothing(tmp_path):
    """They keep no more rows than the longest that decodes has: otherwise a step would have to see theirs."""
    llm = make(tmp_path, chunk=64, max_batch=3)
    long, short, other = prompts_of([50, 3, 4])
    llm.generate([long, short, other], SamplingParams(max_tokens=2, ignore_eos=True))
    lengths, step = [], FakeSession.step
    llm._session.step = lambda ids, positions, *rest: (
        lengths.append(int(positions.max())) or step(llm._session, ids, positions, *rest)
    )
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (2, 9, 9)]
    done = llm.generate([short[:1], short, other], params)
    assert [each.token_ids for each in done] == [
        greedy(p, q.max_tokens, ()) for p, q in zip([short[:1], short, other], params)
    ]
    assert max(lengths) == 4 + 9 - 2


def test_seed_is_the_same_alone_and_in_any_batch(llm):
    prompts = prompts_of([5, 11, 3])
    params = [
        SamplingParams(max_tokens=15, temperature=1.5, top_k=50, seed=seed, ignore_eos=True) for seed in (1, 2, 1)
    ]
    alone = [llm.generate(prompt, each).token_ids for prompt, each in zip(prompts, params)]
    assert [each.token_ids for each in llm.generate(prompts, params)] == alone
    assert [each.token_ids for each in llm.generate(prompts[::-1], params[::-1])][::-1] == alone
    assert llm.generate(prompts[0], params[1]).token_ids != alone[0]
    free = SamplingParams(max_tokens=15, temperature=1.5)
    assert llm.generate(prompts[0], free).token_ids != llm.generate(prompts[0], free).token_ids


def test_every_eos_id_stops_and_ignore_eos_does_not(tmp_path):
    (prompt,) = prompts_of([5])
    free = greedy(prompt, 12, ())
    done = make(tmp_path, eos=(free[8], free[4])).generate(prompt, SamplingParams(max_tokens=12))
    assert (done.token_ids, done.finish_reason) == (free[:5], "stop")
    done = make(tmp_path, eos=(free[4],)).generate(prompt, SamplingParams(max_tokens=12, ignore_eos=True))
    assert (done.token_ids, done.finish_reason) == (free, "length")
    stop = SamplingParams(max_tokens=12, ignore_eos=True, stop_token_ids=[free[6]])
    assert make(tmp_path).generate(prompt, stop).token_ids == free[:7]


@pytest.mark.parametrize("length", [1, 40, 62, 63])
def test_context_limit_ends_cleanly(tmp_path, length):
    (prompt,) = prompts_of([length])
    llm = make(tmp_path, eos=())
    done = llm.generate(prompt, SamplingParams(max_tokens=None))
    assert (len(done.token_ids), done.finish_reason) == (64 - length, "length")
    assert done.token_ids == greedy(prompt, 64 - length, ())
    short = make(tmp_path, eos=(), max_seq=length + 1).generate(prompt, SamplingParams(max_tokens=100))
    assert short.token_ids == done.token_ids[:1]


def test_generation_config_is_the_default(tmp_path):
    (prompt,) = prompts_of([5])
    generation = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 7}
    assert make(tmp_path, generation=generation).default_params == SamplingParams(
        max_tokens=7, temperature=0.6, top_p=0.9, top_k=50
    )
    assert len(make(tmp_path, generation={"max_new_tokens": 3}, eos=()).generate(prompt).token_ids) == 3
    with pytest.raises(UserError, match="generation_config.json.*temperature"):
        make(tmp_path, generation={"do_sample": True, "temperature": -1})


def test_logprobs(llm):
    (prompt,) = prompts_of([5])
    done = llm.generate(
        prompt, SamplingParams(max_tokens=6, temperature=2.0, seed=3, logprobs=3, repetition_penalty=1.3)
    )
    assert [entry.token_id for entry in done.logprobs] == done.token_ids
    for step, entry in enumerate(done.logprobs):
        raw = logits_after(prompt + done.token_ids[:step]).astype(np.float64)
        expected = raw - np.log(np.exp(raw).sum())
        assert entry.logprob == pytest.approx(expected[entry.token_id], abs=1e-5)
        assert [index for index, _ in entry.top] == np.argsort(-expected)[:3].tolist()
        assert [value for _, value in entry.top] == pytest.approx(np.sort(expected)[::-1][:3], abs=1e-5)
    assert llm.generate(prompt, SamplingParams(max_tokens=2)).logprobs is None


def test_text_streams_and_stops(tmp_path):
    llm = with_tokenizer(tmp_path, eos=())
    tokenizer = samples.read_tokenizer(tmp_path)
    prompt = "Once upon a time"
    params = SamplingParams(max_tokens=40)
    whole = llm.generate(prompt, params)
    ids = tokenizer.encode(prompt).ids
    assert ids[0] == 1 and whole.prompt_tokens == len(ids)
    assert whole.token_ids == greedy(ids, 40, ())
    assert prompt + whole.text == tokenizer.decode(ids + whole.token_ids)
    pieces = list(llm.generate_stream(prompt, params))
    assert "".join(piece.text for piece in pieces) == whole.text == pieces[-1].completion.text
    assert [piece.token_id for piece in pieces] == whole.token_ids
    assert [piece.finish_reason for piece in pieces] == [None] * 39 + ["length"]
    stop = whole.text[20:24]
    stopped = llm.generate(prompt, SamplingParams(max_tokens=40, stop=["never there", stop]))
    assert stopped.text == whole.text[: whole.text.index(stop)] and stopped.finish_reason == "stop"
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)] != whole.token_ids
    # A stop token's own text is not shown, and text that only began like a stop string is.
    end = SamplingParams(max_tokens=40, stop_token_ids=[whole.token_ids[9]], stop=[whole.text[-1] + "x"])
    shown = llm.generate(prompt, end)
    assert shown.token_ids == whole.token_ids[:10] and whole.text.startswith(shown.text)
    assert llm.generate(prompt, SamplingParams(max_tokens=40, stop=[whole.text[-1] + "x"])).text == whole.text


def test_many_streams_carry_their_index(tmp_path):
    llm = with_tokenizer(tmp_path, max_batch=2)
    prompts = ["one", "two three four five", [5, 6, 7]]
    params = SamplingParams(max_tokens=6)
    texts, done = [""] * 3, {}
    for piece in llm.generate_stream(prompts, params):
        texts[piece.index] += piece.text
        if piece.completion:
            done[piece.index] = piece.completion
    whole = llm.generate(prompts, params)
    assert texts == [each.text for each in whole]
    assert [done[index].token_ids for index in range(3)] == [each.token_ids for each in whole]


def test_a_stream_ends_when_another_call_takes_the_cache(llm):
    (prompt,) = prompts_of([5])
    first = llm.generate_stream(prompt)
    next(first)
    llm.generate(prompt, SamplingParams(max_tokens=2))
    with pytest.raises(UserError, match="later call"):
        next(first)


def test_logits_are_those_of_every_token(llm):
    (prompt,) = prompts_of([23])
    logits = llm.logits(prompt)
    assert logits.shape == (23, VOCAB)
    for place in range(23):
        np.testing.assert_array_equal(logits[place], logits_after(prompt[: place + 1]))


def test_one_prompt_gives_one_and_a_list_gives_a_list(llm):
    (prompt,) = prompts_of([5])
    params = SamplingParams(max_tokens=2)
    assert llm.generate([prompt], params)[0].token_ids == llm.generate(prompt, params).token_ids
    assert llm.generate(np.array(prompt), params).token_ids == llm.generate(tuple(prompt), params).token_ids


@pytest.mark.parametrize(
    ("prompts", "match"),
    [
        ([], "empty"),
        ([[]], "empty"),
        ([[3], []], "empty"),
        ([3, VOCAB], "token id 512 is out of range"),
        ([3, -1], "token id -1 is out of range"),
        ([3, 1 << 80], "out of range"),
        ([3, 2.5], "list of token ids"),
        ([4] * 64, "64 tokens and the context of 64 has room for 63"),
        ("text", "no tokenizer.json"),
        (7, "should be a text"),
        ([{"a": 1}], "should be a text or a list"),
    ],
)
def test_bad_prompts(llm, prompts, match):
    with pytest.raises(UserError, match=match):
        llm.generate_stream(prompts)  # told by the call itself, before the first piece
    assert llm._session.steps == []


def test_bad_calls(llm, tmp_path):
    with pytest.raises(UserError, match="2 SamplingParams"):
        llm.generate([[3]], [SamplingParams(), SamplingParams()])
    with pytest.raises(UserError, match="stop_token_ids"):
        llm.generate([3], SamplingParams(stop="x"))
    with pytest.raises(UserError, match="room for 64"):
        LLM.from_loaded(Loaded(FakeSession(7, spec()), tmp_path, {}), max_seq=65)
    with pytest.raises(UserError, match="empty"):
        with_tokenizer(tmp_path).generate("")
    with pytest.raises(UserError, match="no chat template"):
        with_tokenizer(tmp_path).chat([{"role": "user", "content": "hi"}])
    with pytest.raises(UserError, match="room for 63"):
        with_tokenizer(tmp_path).generate("word " * 200)
    with pytest.raises(UserError, match="is not a folder"):
        LLM(tmp_path / "nothing")
    with pytest.raises(UserError, match="max_batch"):
        LLM(tmp_path, max_batch=0)
    with pytest.raises(UserError, match="runtime should be one of"):
        LLM(tmp_path, runtime="cuda")


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"max_batch": "4"}, "max_batch should be an integer of at least 1, but is '4'"),
        ({"max_batch": None}, "max_batch should be"),
        ({"max_seq": 2.5}, "max_seq should be an integer of at least 1, but is 2.5"),
        ({"max_seq": 0}, "max_seq should be"),
        ({"max_seq": True}, "max_seq should be"),
    ],
)
def test_limits_are_positive_integers(tmp_path, arguments, match):
    with pytest.raises(UserError, match=match):
        LLM(tmp_path, **arguments)
    with pytest.raises(UserError, match=match):
        make(tmp_path, **arguments)


def test_bad_params(llm):
    for outside in (10**9, VOCAB, 1 << 80):
        with pytest.raises(UserError, match=f"stop_token_ids: token id {outside} is out of range.*ids 0 to 511"):
            llm.generate_stream([[3], [4]], [SamplingParams(), SamplingParams(stop_token_ids=[5, outside])])
    for params in (7, {"temperature": 1}, [{"temperature": 1}], "greedy"):
        with pytest.raises(UserError, match="should be SamplingParams"):
            llm.generate_stream([3], params)
    assert llm._session.steps == []
    assert llm.generate([3], SamplingParams(max_tokens=1, stop_token_ids=[VOCAB - 1])).token_ids


def test_closing(tmp_path):
    with make(tmp_path) as llm:
        assert not llm._session.closed
        stream = llm.generate_stream([3, 4], SamplingParams(max_tokens=5, ignore_eos=True))
        chunks = llm.logits_chunks([3, 4])
        next(stream)
    assert llm._session.closed
    llm.close()
    steps = len(llm._session.steps)
    for call in (
        lambda: llm.generate([3]),
        lambda: llm.generate_stream([3]),
        lambda: llm.logits([3]),
        lambda: next(stream),
        lambda: next(chunks),
    ):
        with pytest.raises(UserError, match="this LLM is closed"):
            call()
    assert len(llm._session.steps) == steps


@pytest.mark.parametrize("what", ["tokenizer", "generation config", "max_seq"])
def test_a_failure_to_read_the_folder_closes_the_session(tmp_path, what):
    session = FakeSession(7, spec())
    if what == "tokenizer":
        (tmp_path / "tokenizer.json").write_text("{}")
    generation = {"do_sample": True, "temperature": -1} if what == "generation config" else {}
    with pytest.raises(UserError, match=what.split()[0]):
        LLM.from_loaded(Loaded(session, tmp_path, generation), max_seq=65 if what == "max_seq" else None)
    assert session.closed


def test_times_count_from_the_call(tmp_path, monkeypatch):
    """A clock that moves by one second a step, and only then."""
    clock, step = [100.0], FakeSession.step

    def timed(*arguments):
        clock[0] += 1
        return step(*arguments)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(FakeSession, "step", timed)
    llm, params = make(tmp_path, max_batch=1), SamplingParams(max_tokens=3, ignore_eos=True)
    done = llm.generate(prompts_of([5, 8, 5]), params)  # one chunk, two, one; then two steps each
    assert [each.ttft for each in done] == [1, 5, 8]
    assert [each.tokens_per_second for each in done] == [1, 1, 1]
    stream = llm.generate_stream(prompts_of([5]), params)
    clock[0] += 10
    assert [*stream][-1].completion.ttft == 11


def test_overflowing_model_is_named(llm, monkeypatch):
    monkeypatch.setattr(FakeSession, "step", lambda *_: np.full((1, 1, VOCAB), np.nan, np.float32))
    for params in (
        SamplingParams(),
        SamplingParams(temperature=1.0, top_k=5),
        SamplingParams(temperature=1.0, top_p=0.5),
    ):
        with pytest.raises(UserError, match="overflow"):
            llm.generate([3], params)
