"""What the scheduler needs of a loaded model, whichever runtime holds it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from llmtrt.package import ModelSpec
from llmtrt.runtime.footprint import MemoryUse
from llmtrt.runtime.params import SamplingParams
from llmtrt.runtime.sampling import Sampler


@dataclass(frozen=True)
class Decoding:
    """Where one sequence stands when the device takes it over: its last ``token``, not yet in the KV cache, goes to
    ``position``; at most ``steps`` more are wanted, chosen as ``params`` say. ``sampler`` has the noise and the tokens
    seen so far."""

    token: int
    position: int
    steps: int
    params: SamplingParams
    sampler: Sampler


class Session(Protocol):
    """Weights and a KV cache in a runtime's memory.

    The cache has a row of its own for each slot. One step runs S tokens of each of some slots that lie side by side: row i
    of slot b is token ``input_ids[b, i]`` at absolute position ``positions[b, i]``; positions of one slot are consecutive
    within a step. Its key and value are written at that position and it attends to every position of its slot up to its
    own (or to those in its window). Rows of padding, and idle slots, carry positions past everything that is still to be
    read: what they write there is overwritten before anything reads it.
    """

    spec: ModelSpec
    description: str  # for a person: "ONNX Runtime 1.32.0, CPU, 2 threads"
    chunk: int  # the most rows S that one step takes

    def reserve(self, slots: int, max_seq: int, keep: Sequence[int] = ()) -> int:
        """Makes room for ``slots`` sequences of up to ``max_seq`` tokens (the KV cache holds ``max_seq + chunk`` rows).

        ``keep[b]``: the rows of slot b, from the first on, that should stay as they are. Returns how many slots, from the
        first on, kept theirs; all else in the cache is lost. Raises UserError where that is more than the memory or the
        engine holds.
        """

    def step(
        self, input_ids: np.ndarray, positions: np.ndarray, logits_index: np.ndarray, first: int = 0
    ) -> np.ndarray:
        """Logits, fp32 [B, K, V], of the rows ``logits_index`` [B, K] of int64 ``input_ids`` and ``positions`` [B, S], for
        the slots ``first`` … ``first`` + B − 1."""

    def copy_rows(self, source: int, target: int, rows: int) -> None:
        """Copies the first ``rows`` rows of the cache of slot ``source`` to those of slot ``target``."""

    def clear_rows(self, slot: int, start: int) -> None:
        """Zeroes what may have been written to the cache of ``slot`` from row ``start`` on."""

    def close(self) -> None:
        """Frees what the session holds; calling it twice is fine."""


@runtime_checkable
class DeviceSession(Session, Protocol):
    """A session that chooses tokens where the logits are, and feeds them back by itself.

    Its steps run one behind the other; the host may ask for a step's tokens while the next runs. ``step`` for a slot
    leaves nothing that ``decode`` could go on from: the slot has to be admitted again.
    """

    check_rows: int  # the most rows of a sequence in ``likeliest`` and ``row_logits``, and of all in ``drawn``
    most_checked: int  # rows of all sequences together in ``likeliest`` and ``row_logits``
    prepared: int  # how often a step's shapes were new, so that it took longer than it will again

    def likeliest(self, input_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """As ``step`` of the slots from the first on; gives the likeliest token, int64 [B, S], of every row's logits, −1
        where they were not numbers."""

    def drawn(self, input_ids: np.ndarray, positions: np.ndarray, samplers: Sequence[Sampler | None]) -> np.ndarray:
        """As ``likeliest``; gives the tokens, int64 [B, S], that each of ``samplers`` [B] chooses, row i with the noise of
        its step i from now, which stays to be taken. No sampler may have a repetition penalty; None: any token."""

    def row_logits(self, input_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """As ``step`` of the slots from the first on; the logits of every row, [B, S, V], in less time where steps of the
        size come again."""

    def admit(self, index: int, decoding: Decoding) -> None:
        """From the next ``decode`` on, slot ``index`` decodes what ``decoding`` says."""

    def park(self, index: int, position: int) -> None:
        """From the next ``decode`` on, slot ``index`` idles: it writes to row ``position`` of its cache and no other."""

    def decode(self, slots: int, length: int, greedy: bool) -> None:
        """Starts the next step of the first ``slots`` slots, none of whose positions is ``length`` or more.

        ``greedy``: no slot that counts wants anything but the likeliest token of the logits as they are. Two steps at most
        may be under way.
        """

    def tokens(self) -> np.ndarray:
        """Waits for the earliest step under way: the next token, int64 [slots], of each; −1 where the logits were not
        numbers."""

    def memory(self) -> MemoryUse:
        """The device's memory by kind."""
