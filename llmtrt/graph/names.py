"""What tensors of a graph are called that other places know by name; no onnx is imported for it."""

PAST_VALUE = "past_value_"  # of layer i: the cache of its values
VALUE_ROWS = "value_rows_"  # inputs [N, rows of a step, Hkv · D] of a plan for one row: where that cache begins
