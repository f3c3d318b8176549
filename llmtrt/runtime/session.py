"""What the token loop needs of a loaded model, whichever runtime holds it."""

from typing import Protocol

import numpy as np

from llmtrt.package import ModelSpec


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
