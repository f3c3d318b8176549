"""The forms in which a weight can enter the graph, and who hands them to the graph's writer."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir


@dataclass(frozen=True)
class Plain:
    """A matrix [N, K] or a table [V, H] as the checkpoint has it, in the model's own type."""

    tensor: ir.TensorProtocol


@dataclass(frozen=True)
class Int4:
    """``q`` INT4 [K, N] and ``scale`` [K / block, N]; ``order`` INT64 [K]: the input feature of each row, if permuted."""

    q: ir.TensorProtocol
    scale: ir.TensorProtocol
    block: int
    order: np.ndarray | None = None


@dataclass(frozen=True)
class Int8:
    """``q`` INT8 [K, N] and ``scale`` [N], one for each output."""

    q: ir.TensorProtocol
    scale: ir.TensorProtocol


@dataclass(frozen=True)
class PackedTable:
    """``q`` INT32 [V, H · bits / 32]: each holds the bits of Σ (vⱼ + 2^(bits − 1)) · 2^(bits · j) over 32 / bits values;
    ``scale`` [V, blocks]."""

    q: ir.TensorProtocol
    scale: ir.TensorProtocol
    bits: int


class Weights(Protocol):
    """Hands out the tensors of one model, in any order, by the checkpoint's names; shapes are what the graph expects."""

    head_is_table: bool  # a tied head multiplies with the embedding's own Plain table

    def linear(self, name: str, k: int, n: int) -> Plain | Int4 | Int8: ...

    def table(self, name: str, rows: int, columns: int) -> Plain | PackedTable: ...

    def vector(self, name: str, length: int, dtype: ir.DataType, offset: float = 0.0) -> ir.TensorProtocol:
        """A norm's weight or a bias, with ``offset`` added."""
