"""One prompt on its way to a completion: the state of a slot of the token loop that is not in the session."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from llmtrt.package import ModelSpec
from llmtrt.runtime.detokenize import Detokenizer, TextStream
from llmtrt.runtime.params import SamplingParams
from llmtrt.runtime.sampling import Sampler, TokenLogprob
from llmtrt.runtime.session import Decoding
from llmtrt.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class Completion:
    """What a request generated.

    ``text``: the decoded tokens up to the stop token or stop string, which are not in it; empty for a model without a
    tokenizer. ``token_ids`` has every generated token, the stop token too. ``finish_reason``, in OpenAI's words:
    ``stop`` (an EOS id, a stop id or a stop string), or ``length`` (max_tokens reached, or the context full); or
    ``cancelled``.
    ``logprobs`` has one entry a token where asked for. ``ttft``: seconds from the call to the first token, the
    wait for its turn included where there are more prompts than ``max_batch``.
    ``tokens_per_second``: the rate of the tokens after the first; None where there is but one.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str
    logprobs: list[TokenLogprob] | None
    ttft: float | None
    tokens_per_second: float | None


@dataclass(frozen=True)
class Piece:
    """One generated token of prompt ``index``: the text that can be shown by now, often ahead or behind of its token.

    Joined, the texts are the completion's text. The last piece has the ``completion``; a cancelled prompt's has no token.
    """

    index: int
    text: str
    token_id: int | None
    logprob: TokenLogprob | None = None
    completion: Completion | None = field(default=None, repr=False)

    @property
    def finish_reason(self) -> str | None:
        return self.completion.finish_reason if self.completion else None


class Request:
    """``prompt``: int64 [P], checked by the caller; ``max_seq``: the most tokens that prompt and answer may have
    together.

    ``called``: ``time.perf_counter()`` at the call. ``context``: the prompt's ids where the text continues it, nothing
    where it starts anew.
    """

    def __init__(
        self,
        index: int,
        prompt: np.ndarray,
        params: SamplingParams,
        spec: ModelSpec,
        max_seq: int,
        tokenizer: Tokenizer | None,
        called: float,
        context: Sequence[int] = (),
    ):
        self.index = index
        self.prompt = prompt
        room = max_seq - len(prompt)
        self.most_tokens = room if params.max_tokens is None else min(room, params.max_tokens)
        self.token_ids: list[int] = []
        self.finished = False
        self.cancelled = False  # asked for, by anyone at any time; the scheduler then ends it
        self._sampler = Sampler(params, spec.vocab_size, prompt)
        self._stop_ids = frozenset(params.stop_token_ids) | (
            frozenset() if params.ignore_eos else {*spec.eos_token_ids}
        )
        self._stream = None
        if tokenizer:
            self._stream = TextStream(Detokenizer(tokenizer.decode, tokenizer.special_ids, context), params.stop)
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        self._called = self._first = called

    @property
    def length(self) -> int:
        """Tokens of the prompt and the answer so far; the last of the answer is not yet in the KV cache."""
        return len(self.prompt) + len(self.token_ids)

    @property
    def wants_logits(self) -> bool:
        """Whether the host has to see every step's logits."""
        return self._logprobs is not None

    @property
    def left(self) -> int:
        """The most tokens that are still to come."""
        return self.most_tokens - len(self.token_ids)

    @property
    def sampler(self) -> Sampler:
        """What chooses its tokens, at its next step."""
        return self._sampler

    @property
    def penalizes(self) -> bool:
        """Whether each token depends on which ones came before."""
        return self._sampler.params.repetition_penalty != 1

    @property
    def is_greedy(self) -> bool:
        """Whether each token is the likeliest of the logits as they are."""
        return self._sampler.params.greedy and not self.penalizes

    def decoding(self) -> Decoding:
        """Where decoding goes on after the tokens so far."""
        return Decoding(self.token_ids[-1], self.length - 1, self.left, self._sampler.params, self._sampler)

    def accept(self, logits: np.ndarray) -> Piece:
        """Takes the next token from ``logits``, fp32 [V]."""
        return self._push(*self._sampler.choose(logits))

    def take(self, token: int) -> Piece:
        """Takes the next token as the device chose it; UserError for −1, its word for logits that are not numbers."""
        self._sampler.take(token)
        return self._push(token)

    def cancel(self) -> Piece:
        """Ends it with what it has; the text that was held back for a stop string to go on with it."""
        rest = self._stream.flush()[0] if self._stream else ""
        self._texts.append(rest)
        return Piece(self.index, rest, None, completion=self._complete("cancelled"))

    def _push(self, token: int, logprob: TokenLogprob | None = None) -> Piece:
        if not self.token_ids:
            self._first = time.perf_counter()
        self.token_ids.append(token)
        if self._logprobs is not None:
            self._logprobs.append(logprob)
        text, stopped = "", False
        if token not in self._stop_ids and self._stream:
            text, stopped = self._stream.push(token)
        ended = stopped or token in self._stop_ids or len(self.token_ids) == self.most_tokens
        if ended and self._stream and not stopped:
            rest, stopped = self._stream.flush()
            text += rest
        self._texts.append(text)
        completion = None
        if ended:
            completion = self._complete("stop" if stopped or token in self._stop_ids else "length")
        return Piece(self.index, text, token, logprob, completion)

    def _complete(self, reason: str) -> Completion:
        self.finished = True
        seconds = time.perf_counter() - self._first
        later = len(self.token_ids) - 1
        return Completion(
            text="".join(self._texts),
            token_ids=self.token_ids,
            prompt_tokens=len(self.prompt),
            finish_reason=reason,
            logprobs=self._logprobs,
            ttft=self._first - self._called if self.token_ids else None,
            tokens_per_second=later / seconds if later > 0 and seconds else None,
        )
