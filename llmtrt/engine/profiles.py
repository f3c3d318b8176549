"""The optimization profiles of an engine: which shapes its inputs may take."""

from dataclasses import asdict, dataclass
from typing import Any

from llmtrt.engine.flavor import Flavor
from llmtrt.engine.options import CONTEXT_STEP, BuildOptions
from llmtrt.errors import UserError

Shape = tuple[int, ...]
# TensorRT-RTX 1.6's attention of one row builds for so many rows of cache less the head dimension, and for two rows without
# a limit (measured to the row for head dims of 16 to 256): above, a decode step is one of up to two.
_ONE_ROW_ATTENTION = 24576


@dataclass(frozen=True)
class Profile:
    """``shapes``: for each input its (min, opt, max) shape."""

    name: str
    shapes: dict[str, tuple[Shape, Shape, Shape]]

    def to_json(self) -> dict:
        return asdict(self)


def decoder_profiles(inputs: dict[str, Shape], options: BuildOptions) -> list[Profile]:
    """Profile 0, decode: S = K = 1 (but see ``_ONE_ROW_ATTENTION``); profile 1, prefill: S and K from 1 to a chunk. B and L
    are free in both, and tuned for ``options.opt_batch`` and ``opt_context``.

    ``inputs``: the network's shapes, −1 where a dimension is dynamic. Those without one, which are weights, need none.
    """
    inputs = {name: shape for name, shape in inputs.items() if any(size < 0 for size in shape)}
    chunk, capacity = options.chunk, options.capacity
    batch = (1, options.opt_batch, options.max_batch)
    context = (1, options.opt_context, capacity)
    head_dim = max((shape[3] for name, shape in inputs.items() if name.startswith("past_")), default=0)
    one, rows, wanted = (1, 1, 1), (1, chunk, chunk), (1, 1, chunk)
    step = one if capacity + head_dim <= _ONE_ROW_ATTENTION else (1, 1, 2)
    return [
        Profile("decode", {name: _shapes(name, shape, batch, step, one, context) for name, shape in inputs.items()}),
        Profile(
            "prefill", {name: _shapes(name, shape, batch, rows, wanted, context) for name, shape in inputs.items()}
        ),
    ]


def one_row_profile(inputs: dict[str, Shape], options: BuildOptions) -> list[Profile]:
    """One profile, of which L alone is free, in steps of what the capacity is a multiple of, and tuned for all of it: that
    takes as many threads as long contexts need, which cost short ones nothing (tools/search_attention.py measured it)."""
    least, most = (CONTEXT_STEP,), (options.capacity,)
    shapes = {name: (least, most, most) for name, shape in inputs.items() if -1 in shape}
    return [Profile("one row", shapes)]


def sampler_profiles(inputs: dict[str, Shape], options: BuildOptions, rows: int = 1) -> list[Profile]:
    """One profile: B is free, for up to ``rows`` rows of each sequence, and there is noise for each row of the cache."""
    sizes = {0: (1, options.opt_batch, rows * options.max_batch), 1: (options.capacity,) * 3}
    shapes = {
        name: tuple(zip(*(sizes[axis] if size < 0 else (size,) * 3 for axis, size in enumerate(shape))))
        for name, shape in inputs.items()
    }
    return [Profile("sample", shapes)]


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
