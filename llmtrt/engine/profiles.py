"""The optimization profiles of an engine: which shapes its inputs may take."""

from dataclasses import asdict, dataclass
from typing import Any

from llmtrt.engine.flavor import Flavor
from llmtrt.errors import UserError

_TYPICAL_CONTEXT = 1024

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """``shapes``: for each input its (min, opt, max) shape."""

    name: str
    shapes: dict[str, tuple[Shape, Shape, Shape]]

    def to_json(self) -> dict:
        return asdict(self)


def make_profiles(inputs: dict[str, Shape], max_batch: int, chunk: int, capacity: int) -> list[Profile]:
    """Profile 0, decode: S = K = 1; profile 1, prefill: S and K from 1 to ``chunk``. B and L are free in both.

    ``inputs``: the network's shapes, −1 where a dimension is dynamic. They are tuned for one sequence at a context of
    1024 (or the capacity), since that is what a person waits for.
    """
    batch = (1, 1, max_batch)
    context = (1, min(_TYPICAL_CONTEXT, capacity), capacity)
    one, rows, wanted = (1, 1, 1), (1, chunk, chunk), (1, 1, chunk)
    return [
        Profile("decode", {name: _shapes(name, shape, batch, one, one, context) for name, shape in inputs.items()}),
        Profile(
            "prefill", {name: _shapes(name, shape, batch, rows, wanted, context) for name, shape in inputs.items()}
        ),
    ]


def _shapes(name: str, shape: Shape, batch: Shape, rows: Shape, wanted: Shape, context: Shape) -> tuple:
    symbols = {
        "input_ids": (batch, rows),
        "positions": (batch, rows),
        "logits_index": (batch, wanted),
        "kv_range": (context,),
    }
    if name in symbols:
        dims = symbols[name]
    elif name.startswith("past_"):
        dims = (batch, *((size, size, size) for size in shape[1:]))
    else:
        raise UserError(
            f"the graph has an input {name!r}, which the graph contract does not know: make the package anew"
        )
    return tuple(zip(*dims))


def add_profiles(flavor: Flavor, builder: Any, config: Any, profiles: list[Profile]) -> None:
    """Adds ``profiles`` to an IBuilderConfig of the flavor."""
    for profile in profiles:
        added = builder.create_optimization_profile()
        for name, shapes in profile.shapes.items():
            added.set_shape(name, *shapes)
        if config.add_optimization_profile(added) < 0:
            raise UserError(
                f"TensorRT {flavor.name} {flavor.version} refuses the {profile.name} profile {profile.shapes}"
            )
