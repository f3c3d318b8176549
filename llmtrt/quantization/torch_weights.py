"""A checkpoint's weights as torch reads them: one by one, under the names that the graph's writer asks for."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from llmtrt.checkpoints.checkpoint import Checkpoint
from llmtrt.graph.decoder import EMBEDDING
from llmtrt.graph.weights import Plain

_TABLE = f"{EMBEDDING}.weight"


class TorchWeights:
    """The graph writer's Weights, which only takes down shapes; ``read`` gives a tensor that it was asked for.

    Matrices are fp32 [N, K], norms have their offset added; the embedding keeps the checkpoint's type, for only rows of
    it are used.
    """

    def __init__(self, checkpoint: Checkpoint, tied: bool):
        self._checkpoint, self._infos, self.head_is_table = checkpoint, checkpoint.tensors(), tied
        self._offsets: dict[str, float] = {}  # of all that the graph asked for

    def linear(self, name: str, k: int, n: int) -> Plain:
        return self.table(name, n, k)

    def table(self, name: str, rows: int, columns: int) -> Plain:
        self._offsets[name] = 0.0
        return Plain(_placeholder(name, rows, columns))

    def vector(self, name: str, length: int, dtype: ir.DataType, offset: float = 0.0) -> ir.TensorProtocol:
        self._offsets[name] = offset
        return _placeholder(name, length)

    def __contains__(self, name: str) -> bool:
        return name in self._offsets

    def read(self, name: str) -> Tensor:
        """On the host."""
        if self._infos[name].dtype == "int4":
            return torch.from_numpy(self._dequantized(name))
        values = self._checkpoint.read(name)
        if name == _TABLE:
            return _as_stored(values)
        return torch.from_numpy(values.astype(np.float32) + np.float32(self._offsets[name]))

    def _dequantized(self, name: str) -> np.ndarray:
        stored = self._checkpoint.read_blocks(name)
        weight = np.repeat(stored.scale.astype(np.float32), stored.group_size, axis=0) * stored.q
        if stored.order is not None:
            weight[stored.order] = weight.copy()
        return np.ascontiguousarray(weight.T)


def _placeholder(name: str, *shape: int) -> ir.LazyTensor:
    def unread() -> ir.TensorProtocol:
        raise AssertionError(f"{name} is read by its name")

    return ir.LazyTensor(unread, ir.DataType.FLOAT, ir.Shape(shape), name=name)


def _as_stored(values: np.ndarray) -> Tensor:
    if values.dtype == ml_dtypes.bfloat16:  # torch takes no such array, but its bits
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)
