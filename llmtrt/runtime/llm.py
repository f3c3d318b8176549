"""``LLM``: a package or an engine as something that answers."""

import time
from collections.abc import Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import Self

import numpy as np

from llmtrt.errors import UserError
from llmtrt.runtime.footprint import MemoryUse
from llmtrt.runtime.load import Loaded, load
from llmtrt.runtime.params import SamplingParams, check_integer
from llmtrt.runtime.request import Completion, Piece, Request
from llmtrt.runtime.scheduler import Scheduler
from llmtrt.runtime.session import DeviceSession
from llmtrt.runtime.speculation import Speculation
from llmtrt.runtime.stream import Stream
from llmtrt.runtime.tokenizer import TOKENIZER, Tokenizer

Prompt = str | Sequence[int]
Params = SamplingParams | Sequence[SamplingParams] | None

ENGINE_OPTIONS = frozenset(
    "weight_budget package allocation kernel_specialization cuda_graphs kernel_cache trust_host_code".split()
)
PROMPT_LOOKUP = "prompt-lookup"
_LOGITS_BYTES = 64 << 20  # of one step where every token's logits are wanted


class LLM:
    """A model that is loaded for generation, and a context manager; for one thread at a time.

    ``path``: a package (made by `llmtrt quantize`) or an engine (by `llmtrt build`). ``runtime``: ``tensorrt``,
    ``onnxruntime``, or ``auto``: TensorRT for an engine, ONNX Runtime for a package, and for the package of an engine
    that cannot run here (``notice`` then says why). ``max_batch``: how many prompts are generated together; of more than
    that, each takes the place of one that has ended. ``max_seq``: the most tokens of a prompt and its answer together
    (None: what the model or engine has); memory for them is taken only as requests need it. ``chunk``, ``threads``,
    ``accuracy_level``: see ``OrtSession``; they do nothing on TensorRT. ``reuse_prefixes``: a prompt that begins as one
    before it did, such as a chat's next turn or one with the same system prompt, is computed from where it differs.
    ``speculation``: ``prompt-lookup`` guesses what follows from what followed in the text so far, and checks several
    tokens in one step where that is faster; tokens stay those of one step each, but for logits that differ in their last
    bits; a ``Speculation`` takes another ``Drafter``. ``verify=False`` skips the SHA-256 of the files. For an engine, see
    ``TrtSession`` on ``weight_budget``, ``package`` (a path here), ``allocation``, ``kernel_specialization``,
    ``cuda_graphs``, ``kernel_cache`` and ``trust_host_code``.

    Attributes: ``spec`` (``ModelSpec``), ``runtime`` (a description for a person), ``notice`` (a sentence or None),
    ``max_batch``, ``max_seq``, ``tokenizer`` (None where the model has none), ``default_params`` (``SamplingParams``
    from the model's generation_config.json).

    Raises UserError if the folder is neither, is corrupt, or cannot run here.
    """

    def __init__(
        self,
        path: str | Path,
        runtime: str = "auto",
        max_batch: int = 8,
        max_seq: int | None = None,
        chunk: int | None = None,
        threads: int | None = None,
        accuracy_level: int = 4,
        reuse_prefixes: bool = True,
        speculation: str | Speculation | None = None,
        verify: bool = True,
        **engine_options: object,
    ):
        _check_limits(max_batch, max_seq)
        if unknown := engine_options.keys() - ENGINE_OPTIONS:
            raise UserError(f"LLM has no option {', '.join(sorted(unknown))}: see its documentation")
        if speculation == PROMPT_LOOKUP:
            speculation = Speculation()
        if not isinstance(speculation, Speculation | None):
            raise UserError(f"speculation should be {PROMPT_LOOKUP}, a Speculation or None, but is {speculation!r}")
        options = {"threads": threads, "accuracy_level": accuracy_level} | ({} if chunk is None else {"chunk": chunk})
        loaded = load(Path(path), runtime, verify, engine_options, options)
        self._set_up(loaded, max_batch, max_seq, reuse_prefixes, speculation)

    @classmethod
    def from_loaded(
        cls,
        loaded: Loaded,
        max_batch: int = 8,
        max_seq: int | None = None,
        reuse_prefixes: bool = True,
        speculation: Speculation | None = None,
    ) -> Self:
        """An LLM over a session of the caller's own, which ``close`` closes, and so does a failure to read the folder."""
        _check_limits(max_batch, max_seq)
        llm = cls.__new__(cls)
        llm._set_up(loaded, max_batch, max_seq, reuse_prefixes, speculation)
        return llm

    def _set_up(
        self,
        loaded: Loaded,
        max_batch: int,
        max_seq: int | None,
        reuse_prefixes: bool,
        speculation: Speculation | None,
    ) -> None:
        self._session = loaded.session
        self._scheduler = Scheduler(self._session, reuse_prefixes, speculation)
        self._turn, self._closed, self._running = 0, False, None
        try:
            self._read(loaded, max_batch, max_seq)
        except BaseException:
            self.close()
            raise

    def _read(self, loaded: Loaded, max_batch: int, max_seq: int | None) -> None:
        self.spec = self._session.spec
        self.runtime = self._session.description
        self.notice = loaded.notice
        self.max_batch = min(max_batch, loaded.max_batch or max_batch)
        limit = min(self.spec.max_seq, loaded.max_seq or self.spec.max_seq)
        if max_seq is not None and max_seq > limit:
            raise UserError(
                f"max_seq is {max_seq}, but {loaded.folder} has room for {limit} tokens: ask for that at most"
            )
        self.max_seq = max_seq or limit
        self._generation = loaded.generation
        self.default_params = self.params()
        has_tokenizer = (loaded.folder / TOKENIZER).is_file()
        self.tokenizer = Tokenizer(loaded.folder, self.spec.bos_token_id) if has_tokenizer else None
        self._folder = loaded.folder

    @property
    def speculation(self) -> Speculation | None:
        """What drafts tokens and counts how many were right; None where each step gives one token."""
        return self._scheduler.speculation

    def params(self, **overrides: object) -> SamplingParams:
        """``default_params`` with some of them replaced; None replaces nothing. See
        ``SamplingParams.from_generation``."""
        return SamplingParams.from_generation(self._generation, **overrides)

    def generate(self, prompts: Prompt | Sequence[Prompt], params: Params = None) -> Completion | list[Completion]:
        """Completes one prompt, or many together; a prompt is a text or a list of token ids.

        ``params``: for all prompts, or one for each; None takes ``default_params``. Returns a ``Completion`` for one
        prompt, a list in the prompts' order for many. The text continues the prompt: a space that parts the two is in
        it.

        Raises UserError for an empty prompt, one that leaves no room in ``max_seq``, an id that the vocabulary does not
        have, and a cache that memory does not hold.
        """
        called = time.perf_counter()
        prompts, many = _as_many(prompts)
        completions = self._finish(self._start(prompts, params, called))
        return completions if many else completions[0]

    def generate_stream(self, prompts: Prompt | Sequence[Prompt], params: Params = None) -> Stream:
        """As ``generate``, token by token; with many prompts, ``Piece.index`` says whose a piece is.

        A prompt's last piece carries its completion. ``Stream.cancel`` ends one prompt; any later call on this LLM ends the
        stream.
        """
        called = time.perf_counter()
        return self._start(_as_many(prompts)[0], params, called)

    def chat(self, messages: Sequence[dict], params: SamplingParams | None = None, **variables: object) -> Completion:
        """The assistant's answer to ``messages`` (objects with ``role`` and ``content``) in the model's own chat
        format.

        ``variables`` reach the chat template (``tools``, ``enable_thinking``, …). Raises UserError as ``generate``, if
        the model has no chat template, and if the template refuses the messages.
        """
        return self._finish(self.chat_stream(messages, params, **variables))[0]

    def chat_stream(
        self, messages: Sequence[dict], params: SamplingParams | None = None, **variables: object
    ) -> Stream:
        """As ``chat``, token by token; ``Piece.text`` is what can be printed by now."""
        called = time.perf_counter()
        text = self._with_tokenizer().render_chat(messages, **variables)
        return self._start([self.encode(text, special=False)], params, called, continues=False)

    def require_chat(self) -> None:
        """Raises UserError where no ``chat`` is possible: without tokenizer or chat template."""
        self._with_tokenizer().chat_template  # noqa: B018 - read from its file here

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of ``text``; ``special`` adds BOS where the model's tokenizer does, never a second one."""
        return self._with_tokenizer().encode(text, special)

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Logits, fp32 [S, V], of every token of one sequence of S ids."""
        return np.concatenate([chunk.copy() for chunk in self.logits_chunks(token_ids)])

    def logits_chunks(self, token_ids: Sequence[int]) -> Iterator[np.ndarray]:
        """As ``logits`` in consecutive parts, fp32 [n, V], of about 64 MiB; each is valid until the next."""
        self._require_open()
        ids = self._checked(token_ids, self.max_seq)
        turn = self._next_turn()
        for part in self._scheduler.logits(ids, max(1, _LOGITS_BYTES // (4 * self.spec.vocab_size))):
            yield part
            self._in_turn(turn)  # before the next step writes to the cache

    def memory(self) -> MemoryUse | None:
        """GPU memory by kind, predicted and measured, on TensorRT; None on ONNX Runtime, whose memory is the process's."""
        self._require_open()
        return self._session.memory() if isinstance(self._session, DeviceSession) else None

    def close(self) -> None:
        """Frees the model's memory and ends its streams; calling it twice is fine."""
        self._closed = True
        self._end_running()
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, prompts: list[Prompt], params: Params, called: float, continues: bool = True) -> Stream:
        """Checks everything now, so that a mistake is told by the call and not by the first piece."""
        self._require_open()
        if params is None or isinstance(params, SamplingParams):
            params = [params] * len(prompts)
        if not isinstance(params, (list, tuple)) or not all(
            each is None or isinstance(each, SamplingParams) for each in params
        ):
            raise UserError("params should be SamplingParams, or a list of them with one for each prompt")
        if len(params) != len(prompts):
            raise UserError(
                f"there are {len(prompts)} prompts but {len(params)} SamplingParams: give one, or one a prompt"
            )
        params = [self.default_params if each is None else each for each in params]
        for each in params:
            if each.stop and self.tokenizer is None:
                raise UserError(f"stop strings need a tokenizer, and {self._folder} has none: use stop_token_ids")
            self._require_ids("stop_token_ids: ", each.stop_token_ids)
        ids = [self._checked(prompt, self.max_seq - 1) for prompt in prompts]
        requests = [
            Request(
                index,
                prompt,
                each,
                self.spec,
                self.max_seq,
                self.tokenizer,
                called,
                prompt.tolist() if continues else (),
            )
            for index, (prompt, each) in enumerate(zip(ids, params))
        ]
        return Stream(self._run(requests, self._next_turn()), requests)

    def _run(self, requests: list[Request], turn: int) -> Iterator[Piece]:
        self._in_turn(turn)
        running = self._running = self._scheduler.run(requests, self.max_batch)
        try:
            for piece in running:
                yield piece
                self._in_turn(turn)
        finally:
            running.close()

    def _finish(self, pieces: Iterator[Piece]) -> list[Completion]:
        done = {piece.index: piece.completion for piece in pieces if piece.completion}
        return [done[index] for index in range(len(done))]

    def _next_turn(self) -> int:
        self._end_running()
        self._turn += 1
        return self._turn

    def _end_running(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None

    def _in_turn(self, turn: int) -> None:
        """There is one KV cache: a stream that was left for another call cannot go on."""
        self._require_open()
        if turn != self._turn:
            raise UserError(
                "this stream was ended by a later call on the same LLM: finish one before the next, or load two"
            )

    def _require_open(self) -> None:
        if self._closed:
            raise UserError("this LLM is closed: load it again")

    def _require_ids(self, what: str, ids: Sequence[int]) -> None:
        if outside := [token for token in ids if not 0 <= token < self.spec.vocab_size]:
            raise UserError(
                f"{what}token id {outside[0]} is out of range: the vocabulary has ids 0 to {self.spec.vocab_size - 1}"
            )

    def _with_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError(
                f"{self._folder} has no {TOKENIZER}: make the package of a checkpoint that has one, or give prompts as "
                "lists of token ids in Python"
            )
        return self.tokenizer

    def _checked(self, prompt: Prompt, most: int) -> np.ndarray:
        """Token ids, int64 [P], of a prompt that has 1 to ``most`` tokens."""
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        if not len(ids) or (isinstance(prompt, str) and not prompt):
            raise UserError("the prompt is empty: give at least one token")
        if not isinstance(prompt, str) and not all(isinstance(token, Integral) for token in ids):
            raise UserError("a prompt should be a text or a list of token ids")
        self._require_ids("", ids)
        if len(ids) > most:
            raise UserError(
                f"the prompt has {len(ids)} tokens and the context of {self.max_seq} has room for {most}: shorten it"
                + (" or load the model with a larger max_seq" if self.max_seq < self.spec.max_seq else "")
            )
        return np.asarray(ids, np.int64)


def _check_limits(max_batch: int, max_seq: int | None) -> None:
    check_integer("max_batch", max_batch, 1)
    check_integer("max_seq", max_seq, 1, optional=True)


def _as_many(prompts: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """The prompts as a list, and whether there may be many."""
    if isinstance(prompts, str):
        return [prompts], False
    if not isinstance(prompts, (list, tuple, np.ndarray)):
        raise UserError(
            f"prompts should be a text, a list of token ids or a list of those, but are {type(prompts).__name__}"
        )
    if not len(prompts):
        raise UserError("the prompt is empty: give at least one token")
    if isinstance(prompts[0], Integral):
        return [prompts], False
    for prompt in prompts:
        if not isinstance(prompt, (str, list, tuple, np.ndarray)):
            raise UserError(f"each prompt should be a text or a list of token ids, but one is {type(prompt).__name__}")
    return list(prompts), True
