"""Forms written for TensorRT's compiler, each by itself on a GPU against float64: what it fuses, it may fuse wrongly."""

from contextlib import closing

import pytest
import search_attention
import search_projection
import trial_plan
from test_gpu import gpu  # noqa: F401 - skips where there is none

pytestmark = pytest.mark.gpu

PRODUCTS = [
    *((form, k) for form in ("packed", "packed, blocks of 64", "int8, packed") for k in (640, 2048, 4096)),
    ("packed, blocks of 64", 576),  # half a span is filled up; those before have one, two and four slices
    ("int8, packed", 576),
]


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("form, k", PRODUCTS)
def test_products_of_packed_weights(form, k, rows, tmp_path):
    form, shapes = search_projection.FORMS[form], (k, 1024)
    model, arrays = search_projection.chain(form, rows, shapes, 1)
    plan, inputs = trial_plan.build(model), search_projection.given(rows, arrays, shapes, 1)
    with closing(trial_plan.Running(plan, inputs, tmp_path / "kernels", "NONE")) as running:
        wrong = search_projection.error(form, running.output("first"), shapes)
    print(f"error {wrong:.1e}")
    assert wrong < 3e-3


@pytest.mark.parametrize("share", [0.001, 0.3, 0.9])  # of the context that is behind the position
@pytest.mark.parametrize("capacity, length", [(1024, 256), (1024, 768), (8448, 256), (8448, 8192)])
def test_attention_in_splits(capacity, length, share, tmp_path):
    """As a decode step of that capacity has it, where few splits see anything and where all do."""
    splits = search_attention.one_row_attention.splits_of(capacity)
    inputs = search_attention.given(splits, capacity, length, 2, share)
    plan = search_attention.built(splits, capacity, 2)
    with closing(search_attention.running(plan, inputs, tmp_path / "kernels")) as running:
        wrong = search_attention.error(running.output("first"), inputs)
    print(f"error {wrong:.1e}")
    assert wrong < 3e-3
