"""What every reader of checkpoints yields: named tensors, one at a time, and the files around them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class TensorInfo:
    """``shape`` as the model's module has it (a Linear is [out, in] = [N, K]); ``dtype`` as the file names it."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Int4Blocks:
    """Weights W[k, n] = q[k, n] · scale[k // group_size, n] of one Linear, in the layout of the graph contract.

    ``q``: int8 [K, N] with values −8…7; ``scale``: float16 or float32 [K / group_size, N]. Where ``order`` (int64 [K])
    is given, row k of ``q`` multiplies input feature ``order[k]``: GPTQ's activation order.
    """

    q: np.ndarray
    scale: np.ndarray
    group_size: int
    order: np.ndarray | None = None


class Checkpoint(Protocol):
    """A model as the user has it, under Hugging Face's tensor names (``model.layers.0.self_attn.q_proj.weight``).

    A checkpoint is opened by reading its headers alone; every tensor's extent is checked against its file there. Errors
    of the input are UserErrors that name the file and the tensor.
    """

    path: Path
    config: dict  # config.json's content, or the same made from GGUF metadata
    generation_config: dict  # generation_config.json's content; empty where there is none

    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by name. A Linear that is stored as INT4 blocks stands under its ``….weight`` with dtype
        ``int4`` and the shape [N, K]."""

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """The tensor (or those rows of its first axis) as float16, float32 or ml_dtypes.bfloat16, in memory of its own:
        dropping the array frees it."""

    def read_blocks(self, name: str) -> Int4Blocks:
        """The INT4 blocks of a Linear whose dtype is ``int4``, bit-exact as stored."""

    def write_tokenizer(self, folder: Path) -> None:
        """Writes ``tokenizer.json``, and ``tokenizer_config.json`` and ``chat_template.jinja`` where there are such."""

    def digest(self) -> str:
        """SHA-256 over all that the package is made from, independent of where the checkpoint lies."""
