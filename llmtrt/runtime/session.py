"""What the token loop needs of a loaded model, whichever runtime holds it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from llmtrt.package import ModelSpec
from llmtrt.runtime.footprint import MemoryUse
from llmtrt.runtime.params import SamplingParams
from llmtrt.runtime.sampling import Sampler


@dataclass(frozen=True)
class Slot:
    """Where one sequence stands when decoding starts: its last ``token``, not yet in the KV cache, goes to ``position``;
    at most ``steps`` more are wanted, chosen as ``params`` say. ``sampler`` has the noise and the tokens seen so far."""

    token: int
    position: int
    steps: int
    params: SamplingParams
    sampler: Sampler


class Session(Protocol):
    """Weights and a KV cache in a runtime's memory.

    Slot b of the batch owns row b of the KV cache. One step runs S tokens of every slot: row i of slot b is token
    ``input_ids[b, i]`` at absolute position ``positions[b, i]``; positions of one slot are consecutive within a step. Its
    key and value are written at that position and it attends to every position of its slot up to its own (or to those in
    its window). Rows of padding, and idle slots, carry positions from the slot's own length on: what they write there is
    overwritten before anything reads it.
    """

    spec: ModelSpec
    description: str  # for a person: "ONNX Runtime 1.32.0, CPU, 2 threads"
    chunk: int  # the most rows S that one step takes

    def reserve(self, slots: int, max_seq: int) -> None:
        """Makes room for ``slots`` sequences of up to ``max_seq`` tokens (the KV cache holds ``max_seq + chunk`` rows).

        Earlier cache contents are lost. Raises UserError where that is more than the memory or the engine holds.
        """

    def step(self, input_ids: np.ndarray, positions: np.ndarray, logits_index: np.ndarray) -> np.ndarray:
        """Logits, fp32 [B, K, V], of the rows ``logits_index`` [B, K] of int64 ``input_ids`` and ``positions`` [B, S]."""

    def close(self) -> None:
        """Frees what the session holds; calling it twice is fine."""


@runtime_checkable
class DeviceSession(Session, Protocol):
    """A session that chooses tokens where the logits are, and feeds them back by itself."""

    def decode(self, slots: Sequence[Slot]) -> Iterator[np.ndarray]:
        """The next tokens, int64 [B], of every slot of the batch, step by step, after ``step`` ran their prompts.

        As many as the longest of ``slots`` wants; what comes for a slot past its own is to be ignored. A token is −1
        where the logits were not numbers. Closing the iterator ends it.
        """

    def memory(self) -> MemoryUse:
        """The device's memory by kind."""
