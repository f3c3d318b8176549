"""Lowerings: another form of the canonical graph's mathematics, where a flavor builds only that or runs it faster."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class Target:
    """What a lowering may look at besides the model: ``flavor`` and ``capabilities`` of llmtrt.engine.flavor.Flavor, the
    ``capacity`` of the KV cache in rows per sequence, where ``weights`` are to be, in the "plan" or its "inputs", whether
    the graph is for ``one_row`` of one sequence, a decode step, alone, or for all steps but those (``prefill``), and whether
    it ``merges`` weights into others, which nobody then finds by name. Capacity and context are multiples of
    ``context_step`` rows. ``value_rows``: the cache has the values of a token side by side, as steps of one row want it."""

    flavor: str
    capabilities: frozenset[str]
    capacity: int
    weights: str = "plan"
    one_row: bool = False
    prefill: bool = False
    context_step: int = 256
    merges: bool = False
    value_rows: bool = False


@dataclass(frozen=True)
class Lowering:
    """``apply`` returns the other model; it may change the one it is given, which is ``lower``'s own copy, with the
    types and shapes of all values that ONNX shape inference finds.

    Network inputs and outputs keep their names, types and meaning, so that one session runs either form, but for the
    layout of cached values (``lowerings.value_rows``). They may be joined by ``decode_rows`` int64 [N], of which the length
    alone counts: 1 in a decode profile, 0 in one for prefill; and in a graph for one row by ``value_rows_i``, of the memory
    of past_value_i (``lowerings.one_row_attention``), and outputs that nobody reads (``Rewrite.write_out``).
    """

    name: str  # as the engine's manifest names it
    applies: Callable[[ir.Model, Target], bool]
    apply: Callable[[ir.Model, Target], ir.Model]


def lower(model: ir.Model, target: Target, lowerings: Sequence[Lowering] | None = None) -> tuple[ir.Model, list[str]]:
    """A copy of ``model`` with every lowering that applies (of all, in their order), and the names of those.

    ``model`` itself stays as it is; weights are shared, not copied.
    """
    if lowerings is None:
        from llmtrt.graph.lowerings import LOWERINGS as lowerings
    from onnx_ir.passes.common import ShapeInferencePass

    model, names = ShapeInferencePass()(model.clone()).model, []
    for lowering in lowerings:
        if lowering.applies(model, target):
            model = lowering.apply(model, target)
            names.append(lowering.name)
    return model, names
