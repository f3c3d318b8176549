"""Streamed text against the tokenizers library's decoding of the whole, on real tokenizers."""

import random
import re

import pytest
import samples

from llmtrt.runtime.detokenize import Detokenizer, StopStrings

TEXTS = [
    "Plain English, with  two spaces and\nnew\n\nlines.",
    " a leading space",
    "héllo wörld — “quotes”",
    "😀👨‍👩‍👧🏳️‍🌈 emoji at the start and the end 😀",
    "日本語と中文，한국어 ﷽ ཨོཾ་མ་ཎི་པདྨེ་ཧཱུྃ",
    "a \ufffd b \ufffd\ufffd",
    "مرحبا بالعالم",
    "🤷🏽‍♀️",
]


@pytest.fixture
def smollm2_tokenizer():
    return samples.read_tokenizer(samples.smollm2_tokenizer())


@pytest.fixture
def stories_tokenizer():
    return samples.read_tokenizer(samples.stories260k())


@pytest.fixture(params=["smollm2_tokenizer", "stories_tokenizer"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def stream(tokenizer, ids, context=()):
    detokenizer = Detokenizer(
        lambda some: tokenizer.decode(some, skip_special_tokens=True), special_ids(tokenizer), context
    )
    return [detokenizer.push(token) for token in ids] + [detokenizer.flush()]


def special_ids(tokenizer):
    return {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_whole_text(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_no_piece_before_the_last_has_half_a_character(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    whole = tokenizer.decode(ids)
    for end in range(len(ids)):
        pieces = stream(tokenizer, ids[:end])
        assert whole.startswith("".join(pieces[:-1]))
        assert re.fullmatch("\ufffd*", pieces[-1])


def test_random_byte_level_tokens(smollm2_tokenizer):
    tokenizer = smollm2_tokenizer
    for seed in range(200):
        ids = random.Random(seed).choices(range(tokenizer.get_vocab_size()), k=60)
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_random_byte_fallback_tokens_never_fail(stories_tokenizer):
    """The library's own DecodeStream raises on these; what is no UTF-8 may differ in its number of U+FFFD only."""

    def squeezed(text):
        return re.sub("\ufffd+", "", text)

    for seed in range(200):
        ids = random.Random(seed).choices(range(tokenizer_size := stories_tokenizer.get_vocab_size()), k=40)
        assert tokenizer_size == 512
        letters = [token for token in ids if not 3 <= token < 259]
        whole = stories_tokenizer.decode(letters, skip_special_tokens=True)
        assert "".join(stream(stories_tokenizer, letters)) == whole
        streamed = squeezed("".join(stream(stories_tokenizer, ids)))
        assert {*squeezed(stories_tokenizer.decode(ids, skip_special_tokens=True))} <= {*streamed}


def test_special_tokens_have_no_text_and_break_nothing(tokenizer):
    ids = tokenizer.encode("one two 😀", add_special_tokens=False).ids
    special = min(special_ids(tokenizer))
    mixed = [token for pair in ids for token in (special, pair, special, special)]
    assert "".join(stream(tokenizer, mixed)) == tokenizer.decode(ids)


def test_context_keeps_the_space_between_prompt_and_text(stories_tokenizer):
    prompt = stories_tokenizer.encode("Once upon a").ids
    answer = stories_tokenizer.encode("time there was", add_special_tokens=False).ids
    whole = stories_tokenizer.decode(prompt + answer)
    assert whole == "Once upon a time there was"
    assert "".join(stream(stories_tokenizer, answer, prompt)) == " time there was"
    assert "".join(stream(stories_tokenizer, answer)) == "time there was"


def test_context_may_end_inside_a_character(smollm2_tokenizer):
    ids = smollm2_tokenizer.encode("say 日", add_special_tokens=False).ids
    assert "".join(stream(smollm2_tokenizer, ids[-1:], ids[:-1])) in ("日", " 日")


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_stop_strings(size):
    """Every way to cut a text, against str.find on the whole."""
    rng = random.Random(size)
    stopped = 0
    for _ in range(500):
        text = "".join(rng.choices("abc", k=30))
        stops = ["".join(rng.choices("abc", k=rng.randint(1, 6))) for _ in range(rng.randint(1, 3))]
        finder, out, done = StopStrings(stops), "", False
        for start in range(0, len(text), size):
            piece, done = finder.push(text[start : start + size])
            out += piece
            assert text.startswith(out)
            if done:
                break
        else:
            out += finder.flush()
        # With several stops, the one that is complete first ends the text.
        ends = {stop: text.find(stop) for stop in stops if stop in text}
        assert done == bool(ends)
        if done:
            first = min(place + len(stop) for stop, place in ends.items())
            expected = min(place for stop, place in ends.items() if place + len(stop) == first)
            assert out == text[:expected]
        elif not done:
            assert out == text
        stopped += done
    assert 0 < stopped


def test_stop_string_across_tokens_with_half_characters(smollm2_tokenizer):
    ids = smollm2_tokenizer.encode("before 日本語END after", add_special_tokens=False).ids
    finder, out = StopStrings(["語EN"]), ""
    for piece in stream(smollm2_tokenizer, ids):
        text, done = finder.push(piece)
        out += text
        if done:
            break
    assert out == "before 日本"
