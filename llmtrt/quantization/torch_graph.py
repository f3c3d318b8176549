"""Runs the canonical graph on torch tensors, layer by layer: calibration sees the very model that is shipped.

Sequences start at position 0 and are run whole, so that a KV cache is what was written to it. Values carry gradients
where the weights that they come from do.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

Values = dict[str, Any]

_DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT64: torch.int64,
    ir.DataType.INT32: torch.int32,
    ir.DataType.BOOL: torch.bool,
}


class TorchGraph:
    """The nodes of ``model``: those ``before`` the layers, of each of ``layers``, and ``after`` them."""

    def __init__(self, model: ir.Model, layers: int, device: str = "cpu"):
        self._device = device
        self._initializers = model.graph.initializers
        self._constants: dict[str, Any] = {}
        self.before: list[ir.Node] = []
        self.layers: list[list[ir.Node]] = [[] for _ in range(layers)]
        self.after: list[ir.Node] = []
        for node in model.graph:
            index = _layer_of(node.name)
            outside = self.after if any(self.layers) else self.before
            (outside if index is None else self.layers[index]).append(node)

    def inputs(self, ids: Tensor) -> Values:
        """The graph's inputs for whole sequences ``ids`` [B, S], all logits wanted."""
        rows = torch.arange(ids.shape[1], device=self._device)
        positions = rows.expand(ids.shape[0], -1)
        return {"input_ids": ids, "positions": positions, "logits_index": positions, "kv_range": rows}

    def run(self, nodes: Sequence[ir.Node], values: Values, weight: Callable[[str], Tensor]) -> Values:
        """``values`` and all that ``nodes`` compute of them; ``weight(name)`` gives the initializers that are not
        constants."""
        values = dict(values)

        def get(value: ir.Value | None) -> Any:
            if value is None or value.name in values:
                return None if value is None else values[value.name]
            if value.name not in self._initializers:
                return None  # the cache before the first token
            return self._constant(value.name) if _is_constant(value.name) else weight(value.name)

        for node in nodes:
            attributes = {name: attribute.value for name, attribute in node.attributes.items()}
            values[node.outputs[0].name] = _OPERATORS[node.op_type](attributes, *map(get, node.inputs))
        return values

    def weights_of(self, nodes: Sequence[ir.Node]) -> set[str]:
        """Names of the weights that ``nodes`` read."""
        return {name for name in live(nodes) & self._initializers.keys() if not _is_constant(name)}

    def _constant(self, name: str) -> Any:
        if name not in self._constants:
            array = self._initializers[name].const_value.numpy()
            # Shapes and axes stay on the host.
            on_host = array.dtype == np.int64
            self._constants[name] = array if on_host else torch.from_numpy(array.copy()).to(self._device)
        return self._constants[name]


def _is_constant(name: str) -> bool:
    return name.startswith("constant/") or name.endswith(".inv_freq")


def _layer_of(name: str) -> int | None:
    parts = name.replace("/", ".").split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else None


def live(nodes: Sequence[ir.Node]) -> set[str]:
    """Names of the values that ``nodes`` read from outside."""
    made = {value.name for node in nodes for value in node.outputs}
    return {value.name for node in nodes for value in node.inputs if value is not None} - made


def _ints(value: Any) -> list[int]:
    return [int(each) for each in (value.tolist() if isinstance(value, Tensor | np.ndarray) else value)]


def _tensor(value: Any, like: Tensor) -> Any:
    return torch.as_tensor(value, device=like.device) if isinstance(value, np.ndarray) else value


def _two(function: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    def run(attributes: dict, a: Any, b: Any) -> Any:
        if isinstance(a, Tensor):
            b = _tensor(b, a)
        elif isinstance(b, Tensor):
            a = _tensor(a, b)
        return function(a, b)

    return run


def _rms_norm(a: dict, x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, a["epsilon"])


def _gemm(a: dict, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    w = w.to(x.dtype)  # a table keeps the checkpoint's type
    y = x @ (w.T if a.get("transB") else w)
    return y if bias is None else y + bias


def _attention(a: dict, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, scale=a.get("scale"), enable_gqa=q.shape[1] != k.shape[1])


def _rotary(a: dict, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = a.get("rotary_embedding_dim") or x.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, -1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def _slice(a: dict, x: Any, starts: Any, ends: Any, axes: Any) -> Any:
    for start, end, axis in zip(_ints(starts), _ints(ends), _ints(axes)):
        x = x[(slice(None),) * axis + (slice(start, end),)]
    return x


def _shape(a: dict, x: Tensor) -> np.ndarray:
    return np.array(x.shape[a.get("start", 0) : a.get("end")], np.int64)


def _reshape(a: dict, x: Tensor, shape: Any) -> Tensor:
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(_ints(shape))])


def _unsqueeze(a: dict, x: Tensor, axes: Any) -> Tensor:
    for axis in sorted(_ints(axes)):
        x = x.unsqueeze(axis)
    return x


def _squeeze(a: dict, x: Tensor, axes: Any) -> Tensor:
    return x.squeeze(tuple(_ints(axes)))


def _concat(a: dict, *parts: Any) -> Any:
    if any(isinstance(part, Tensor) for part in parts):
        return torch.cat(parts, a["axis"])
    return np.concatenate(parts, a["axis"])


def _gather(a: dict, x: Tensor, index: Any) -> Tensor:
    axis = a.get("axis", 0) % x.ndim
    index = _tensor(index, x)
    found = x.index_select(axis, index.reshape(-1)).reshape(x.shape[:axis] + index.shape + x.shape[axis + 1 :])
    return found.float() if found.is_floating_point() else found  # as does this one


def _gather_nd(a: dict, x: Tensor, index: Tensor) -> Tensor:
    return torch.take_along_dim(x, index.expand(*index.shape[:2], x.shape[2]), 1)


_OPERATORS: dict[str, Callable] = {
    "Add": _two(lambda a, b: a + b),
    "Sub": _two(lambda a, b: a - b),
    "Mul": _two(lambda a, b: a * b),
    "Div": _two(lambda a, b: a / b),
    "And": _two(lambda a, b: a & b),
    "LessOrEqual": _two(lambda a, b: a <= b),
    "Greater": _two(lambda a, b: a > b),
    "Attention": _attention,
    "Cast": lambda a, x: x.to(_DTYPES[ir.DataType(a["to"])]),
    "Concat": _concat,
    "Cos": lambda a, x: x.cos(),
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Gelu": lambda a, x: F.gelu(x, approximate=a.get("approximate", "none")),
    "Gemm": _gemm,
    "MatMul": lambda a, x, w: x @ w,
    "RMSNormalization": _rms_norm,
    "Reshape": _reshape,
    "RotaryEmbedding": _rotary,
    "Shape": _shape,
    "Sigmoid": lambda a, x: x.sigmoid(),
    "Sin": lambda a, x: x.sin(),
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Tanh": lambda a, x: x.tanh(),
    "TensorScatter": lambda a, past, new, at: new,
    "Transpose": lambda a, x: x.permute(a["perm"]),
    "Unsqueeze": _unsqueeze,
}
