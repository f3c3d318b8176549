"""Every lowering, in the order in which they apply."""

from llmtrt.graph.lowerings import (
    decomposed_attention,
    merged_projections,
    one_row,
    one_row_attention,
    one_row_embedding,
    one_row_rotation,
    split_attention,
    static_capacity,
    value_rows,
    weight_inputs,
)

LOWERINGS = (
    static_capacity.LOWERING,
    one_row.LOWERING,
    one_row_embedding.LOWERING,
    one_row_rotation.LOWERING,
    value_rows.LOWERING,
    one_row_attention.LOWERING,
    split_attention.LOWERING,
    decomposed_attention.LOWERING,
    merged_projections.LOWERING,
    weight_inputs.LOWERING,
)
