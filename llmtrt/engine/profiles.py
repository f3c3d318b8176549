"""The optimization profiles of an engine: which shapes its inputs may take."""

from dataclasses import asdict, dataclass
from typing import Any

from llmtrt.engine.flavor import Flavor
from llmtrt.engine.manifest import DECODE_STEPS, PREFILL_STEPS
from llmtrt.engine.options import CONTEXT_STEP, BuildOptions
from llmtrt.errors import UserError
from llmtrt.graph.names import VALUE_ROWS

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """``shapes``: for each input its (min, opt, max) shape."""

    name: str
    shapes: dict[str, tuple[Shape, Shape, Shape]]

    def to_json(self) -> dict:
        return asdict(self)


def decoder_profiles(
    inputs: dict[str, Shape],
    options: BuildOptions,
    *,
    decodes: bool = True,
    one_alone: bool = False,
    steady_rows: tuple[int, ...] = (),
) -> list[Profile]:
    """Decode (unless it ``decodes`` nothing): S = K = 1; prefill: S and K from 1 to a chunk. B and L are free in both, L in
    steps of what the capacity is a multiple of, and tuned for ``options.opt_batch`` and ``opt_context``. And such as leave
    L alone free, for sizes that are known:

    Decode for just ``opt_batch``, just ``max_batch`` and, with ``one_alone``, just one of several sequences: where B is
    free, TensorRT-RTX 1.6 launches as many threads as a cache has numbers to write one row of each (23 of 240 µs a layer for
    16 × 1,536 rows). For one row it merges projections that it merges for no other shapes: beside those of several
    sequences it keeps their weights twice, unless the graph has them as one.

    Prefill of one sequence for each of ``steady_rows`` S with K = 1: where S is free, it multiplies matrices with kernels
    for the tensor cores of 8.0, on whatever GPU (benchmarks/gpu-prefill.json).

    ``inputs``: the network's shapes, −1 where a dimension is dynamic. Those without one, which are weights, need none.
    """
    inputs = {name: shape for name, shape in inputs.items() if any(size < 0 for size in shape)}
    chunk, capacity = options.chunk, options.capacity
    batch, steady = (1, options.opt_batch, options.max_batch), {options.opt_batch, options.max_batch} - {1}
    if one_alone:
        steady.add(1)
    context = (CONTEXT_STEP, -(-options.opt_context // CONTEXT_STEP) * CONTEXT_STEP, capacity)
    none, one, rows, wanted = (0, 0, 0), (1, 1, 1), (1, chunk, chunk), (1, 1, chunk)

    def profile(name: str, batch: Shape, *sizes: Shape) -> Profile:
        return Profile(name, {each: _shapes(each, shape, batch, context, *sizes) for each, shape in inputs.items()})

    found = [profile(DECODE_STEPS, batch, one, one, one)] if decodes else []
    found.append(profile(PREFILL_STEPS, batch, rows, wanted, none))
    if decodes:
        found += [profile(f"{DECODE_STEPS}, batch {size}", (size,) * 3, one, one, one) for size in sorted(steady)]
    return found + [
        profile(f"{PREFILL_STEPS}, {size} rows", one, (size,) * 3, one, none) for size in sorted(steady_rows)
    ]


def one_row_profile(inputs: dict[str, Shape], options: BuildOptions) -> list[Profile]:
    """One profile, of which L and with it N (``value_rows_i``) are free, tuned for the whole capacity: that
    takes as many threads as long contexts need, which cost short ones nothing (tools/search_attention.py measured it)."""
    shapes = {}
    for name, shape in inputs.items():
        if -1 in shape:
            if name == "kv_range":
                sizes = CONTEXT_STEP, options.capacity
            elif name.startswith(VALUE_ROWS):
                sizes = 1, options.capacity // CONTEXT_STEP
            else:
                raise _unknown(name)
            least, most = ((size, *shape[1:]) for size in sizes)
            shapes[name] = least, most, most
    return [Profile("one row", shapes)]


def sampler_profiles(inputs: dict[str, Shape], options: BuildOptions, most: int) -> list[Profile]:
    """One profile: B is free, up to ``most``, and so is for how many steps there is noise, up to the rows of the cache."""
    sizes = {0: (1, options.opt_batch, most), 1: (1, options.capacity, options.capacity)}
    shapes = {
        name: tuple(zip(*(sizes[axis] if size < 0 else (size,) * 3 for axis, size in enumerate(shape))))
        for name, shape in inputs.items()
    }
    return [Profile("sample", shapes)]


def _shapes(
    name: str, shape: Shape, batch: Shape, context: Shape, rows: Shape, wanted: Shape, decode_rows: Shape
) -> tuple:
    symbols = {
        "input_ids": (batch, rows),
        "positions": (batch, rows),
        "logits_index": (batch, wanted),
        "kv_range": (context,),
        "decode_rows": (decode_rows,),
    }
    if name in symbols:
        dims = symbols[name]
    elif name.startswith("past_"):
        dims = (batch, *((size, size, size) for size in shape[1:]))
    else:
        raise _unknown(name)
    return tuple(zip(*dims))


def _unknown(name: str) -> UserError:
    return UserError(f"the graph has an input {name!r}, which the graph contract does not know: make the package anew")


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
