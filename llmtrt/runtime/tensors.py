"""What a plan says of its inputs and outputs."""

from dataclasses import dataclass
from math import prod
from typing import Any

from llmtrt.graph.names import PAST_VALUE, VALUE_ROWS


@dataclass(frozen=True)
class Tensor:
    """``shape``: −1 where a dimension is dynamic, and then no ``bytes``. ``alias``: the input that an output is one buffer
    with, and the cache past_value_i of which an input value_rows_i is the beginning."""

    name: str
    is_input: bool
    shape: tuple[int, ...]
    itemsize: int
    bytes: int | None
    alias: str | None


def tensors_of(engine: Any) -> tuple[Tensor, ...]:
    """All of an ICudaEngine's, in its order."""
    found = []
    for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
        shape, itemsize = tuple(engine.get_tensor_shape(name)), engine.get_tensor_dtype(name).itemsize
        is_input = engine.get_tensor_mode(name).name == "INPUT"
        alias = _cache_of(name) if is_input else engine.get_aliased_input_tensor(name)
        found.append(Tensor(name, is_input, shape, itemsize, None if -1 in shape else prod(shape) * itemsize, alias))
    return tuple(found)


def _cache_of(name: str) -> str | None:
    return name.replace(VALUE_ROWS, PAST_VALUE, 1) if name.startswith(VALUE_ROWS) else None
