"""Every lowering, in the order in which they apply."""

from llmtrt.graph.lowerings import (
    decomposed_attention,
    merged_projections,
    one_row,
    split_attention,
    static_capacity,
    weight_inputs,
)

LOWERINGS = (
    static_capacity.LOWERING,
    one_row.LOWERING,
    split_attention.LOWERING,
    decomposed_attention.LOWERING,
    merged_projections.LOWERING,
    weight_inputs.LOWERING,
)
