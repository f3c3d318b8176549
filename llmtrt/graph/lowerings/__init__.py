"""Every lowering, in the order in which they apply."""

from llmtrt.graph.lowerings import decomposed_attention, static_capacity, weights_as_inputs

LOWERINGS = (static_capacity.LOWERING, decomposed_attention.LOWERING, weights_as_inputs.LOWERING)
