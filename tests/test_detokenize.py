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
    "\ufffd\ufffd\ufffd日本語日本語日本語 end 日",
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


def text_of_run(data):
    """What a stream makes of consecutive byte tokens: what was whole before a bad byte came is shown already, and from
    there on each byte is U+FFFD. (The library turns the whole run to U+FFFD.)"""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start].decode() + "\ufffd" * (len(data) - error.start)


def test_random_byte_fallback_tokens(stories_tokenizer):
    """The library's own DecodeStream raises on these. (A space has a token of its own, no vocabulary writes its byte.)"""
    characters = [bytes([byte]) for byte in range(256) if byte != 32] + [text.encode() for text in "aé日😀" * 50]
    kinds = {True: 0, False: 0}
    for seed in range(300):
        rng = random.Random(seed)
        ids, expected = [], ""
        for _ in range(12):
            run = b"".join(rng.choices(characters, k=rng.randint(0, 3)))  # short of _MOST_PENDING
            words = rng.choices(range(259, 512), k=rng.randint(1, 3))
            ids += [3 + byte for byte in run] + words
            expected += text_of_run(run) + "".join(map(stories_tokenizer.id_to_token, words)).replace("▁", " ")
            kinds["\ufffd" in text_of_run(run)] += 1
        assert "".join(stream(stories_tokenizer, ids)) == expected.removeprefix(" ")
    assert min(kinds.values()) > 500


def test_garbage_is_not_held_back_for_ever(stories_tokenizer):
    for byte in (0x80, 0xE6, 0xF0):
        pieces = stream(stories_tokenizer, [3 + byte] * 100 + [300])
        assert "".join(pieces) == "\ufffd" * 100 + stories_tokenizer.id_to_token(300).replace("▁", " ")
        assert max(map(len, pieces)) < 20


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


@pytest.mark.parametrize("text", [text for text in [*TEXTS, "日" * 30, "😀" * 20] if "\ufffd" not in text])
def test_a_prompt_may_end_at_any_token(tokenizer, text):
    """Prompt and text are the whole; a character that the prompt has half of is in the text as a whole."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    whole, shown = tokenizer.decode(ids), ""
    for cut in range(len(ids) + 1):
        prompt = tokenizer.decode(ids[:cut])
        shown = shown if "\ufffd" in prompt else prompt
        streamed = "".join(stream(tokenizer, ids[cut:], ids[:cut]))
        assert shown + streamed == whole or (cut == len(ids) and not streamed)


@pytest.mark.parametrize("count", [1, 2, 9])
@pytest.mark.parametrize("start", ["", "a ", "日本語", "日本語と中文，한"])
def test_replacement_characters_of_the_prompt_are_not_repeated(tokenizer, start, count):
    prompt = tokenizer.encode(start + "\ufffd" * count).ids
    for more in ("b c", "日", "\ufffd", "é\ufffd"):
        # An answer that begins with a space has a token for it.
        answer = tokenizer.encode("x" + more, add_special_tokens=False).ids
        whole = tokenizer.decode(prompt + answer)
        assert tokenizer.decode(prompt) + "".join(stream(tokenizer, answer, prompt)) == whole


def test_half_a_character_that_the_answer_does_not_complete(tokenizer):
    """It is the prompt's, as U+FFFD, and is not shown a second time."""
    half = [*tokenizer.encode("say 日", add_special_tokens=False).ids][:-1]
    assert tokenizer.decode(half).endswith("\ufffd")
    answer = tokenizer.encode("x", add_special_tokens=False).ids
    assert "".join(stream(tokenizer, answer, half)).strip() == "x"
    assert "".join(stream(tokenizer, [], half)) == ""


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
