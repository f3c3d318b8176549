"""Text out of a growing list of tokens: whole characters only, and never the start of a stop string."""

from collections.abc import Callable, Collection, Sequence

_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 8
_SHIFTS = range(4)  # tokens: a character of n bytes is at most n tokens
_MOST_PENDING = 16  # tokens: a character has 4 bytes at most, so what still fails to decode here is no UTF-8


class Detokenizer:
    """Incremental detokenization: the pieces that ``push`` and ``flush`` return join to the decoding of all tokens.

    Only a short window is decoded each time, from the last tokens that ended in a whole character on: their text tells
    what a tokenizer with leading spaces (SentencePiece) or byte fallback makes of the next ones. ``context``, the
    prompt's ids, is the first such window, so that ``prompt + text`` reads as one; without it a leading space is
    dropped as at the start of a text. ``decode`` is the tokenizer's; ``special_ids`` have no text.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], special_ids: Collection[int], context: Sequence[int] = ()
    ):
        self._decode = decode
        self._special = special_ids
        longest = _CONTEXT_TOKENS + 2 * _SHIFTS[-1]
        tail = [token for token in context[-longest:] if token not in special_ids]
        # A cut through a character costs U+FFFD, with byte fallback for the whole characters beside it too.
        windows = [
            (tail[max(0, len(tail) - half - _CONTEXT_TOKENS - shift) : len(tail) - half], tail[len(tail) - half :])
            for half in _SHIFTS
            for shift in _SHIFTS
            if half <= len(tail)
        ]
        self._settle(*min(windows, key=lambda window: self._broken(window[0])))
        self._shown = self._text()  # the prompt's own

    def _settle(self, context: list[int], pending: Sequence[int] = ()) -> None:
        self._context = context
        self._before = self._text_of(context)
        self._pending = [*pending]
        self._shown = ""  # of the pending tokens' text

    def push(self, token: int) -> str:
        """The text that ``token`` completes; empty while a character is half there."""
        if token in self._special:
            return ""
        self._pending.append(token)
        text = self._text()
        if not text.startswith(self._shown):
            self._shown = ""  # the prompt ended in half a character, which is whole now
        held = _unfinished(text) if len(self._pending) < _MOST_PENDING else 0
        piece = text[len(self._shown) : len(text) - held]
        if piece and not held:
            pending = self._pending
            self._settle(pending[-_CONTEXT_TOKENS:])
            if _REPLACEMENT in self._before:  # cut through a character, or the text's own
                windows = [pending[-_CONTEXT_TOKENS - shift :] for shift in _SHIFTS]
                self._settle(min(windows, key=self._broken))
        else:
            self._shown += piece
        return piece

    def flush(self) -> str:
        """What is still held back once no token follows: half a character, as U+FFFD."""
        piece = self._text().removeprefix(self._shown)
        self._settle([])
        return piece

    def _text(self) -> str:
        """The text of the pending tokens."""
        text = self._text_of(self._context + self._pending)
        if text.startswith(self._before):
            return text[len(self._before) :]
        return self._text_of(self._pending)  # byte fallback: half a character turns the whole ones before it to U+FFFD

    def _broken(self, tokens: list[int]) -> int:
        return self._text_of(tokens).count(_REPLACEMENT)

    def _text_of(self, tokens: list[int]) -> str:
        return self._decode(tokens) if tokens else ""


def _unfinished(text: str) -> int:
    """How many U+FFFD ``text`` ends with: bytes that the next token may complete."""
    return len(text) - len(text.rstrip(_REPLACEMENT))


class StopStrings:
    """Cuts a stream of text before the one of ``stops`` that is complete first; holds back what may begin one."""

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """The text that may be shown, and whether a stop string ended it."""
        if not self._stops:
            return piece, False
        text = self._held + piece
        if found := [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]:
            self._held = ""
            return text[: min(found)[1]], True
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """The text held back, once no more follows."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """Tokens to the text that may be shown: a ``Detokenizer`` followed by ``StopStrings``."""

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str]):
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops)

    def push(self, token: int) -> tuple[str, bool]:
        """The text that may be shown after ``token``, and whether a stop string ended it."""
        return self._stops.push(self._detokenizer.push(token))

    def flush(self) -> tuple[str, bool]:
        """What was held back, once no token follows; unless a stop string ended the text, then nothing is."""
        text, stopped = self._stops.push(self._detokenizer.flush())
        return (text, True) if stopped else (text + self._stops.flush(), False)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of ``stop`` that ``text`` ends with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
