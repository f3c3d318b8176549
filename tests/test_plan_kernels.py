"""What TensorRT-RTX makes of a step of one row, read from the plan: why it is fast, which a GPU then has to show."""

from functools import partial

import families
import onnx_ir as ir
import pytest

pytest.importorskip("tensorrt_rtx_bindings")

import plan_kernels
import search_projection
import trial_plan

from llmtrt.engine.build import _lowered
from llmtrt.engine.flavor import choose
from llmtrt.engine.options import BuildOptions
from llmtrt.engine.plan import build_plan
from llmtrt.engine.profiles import one_row_profile
from llmtrt.graph.structure import load_graph
from llmtrt.quantization.pipeline import quantize
from llmtrt.quantization.recipe import Recipe

LAYERS = families.SIZES["num_hidden_layers"]


@pytest.fixture(scope="module")
def flavor():
    flavor = choose("rtx")
    if not flavor.version.startswith("1.6."):
        pytest.skip(f"the schedule is read from plans of TensorRT-RTX 1.6, this is {flavor.version}")
    return flavor


@pytest.fixture(scope="module", params=[64, 128])
def plan(request, flavor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    recipe = Recipe("rtn", request.param)
    package = quantize(families.save("llama-whole", folder / "checkpoint"), folder / "package", recipe).package
    options = BuildOptions(max_seq=256, chunk=64, weights="inputs").resolved(flavor, package.spec.max_seq)
    model, _ = _lowered(package, load_graph(package), flavor, options, one_row=True)
    graph, profile = ir.to_proto(model).SerializeToString(), partial(one_row_profile, options=options)
    build_plan(flavor, graph, package.graph, profile, options, folder / "decode.plan", lambda *_: None)
    return (folder / "decode.plan").read_bytes()


def test_a_layer_is_few_kernels(plan):
    """Four products; scores, weights, their product with values, and what puts splits together; rotation and cache; two
    norms, and the gate. And the head, with its norm."""
    kernels = plan_kernels.kernels(plan)
    assert len(kernels) == 12 * LAYERS + 2, kernels
    assert not any("Slic" in kernel.name.split("_")[3:] for kernel in kernels), kernels  # a copy of rows of the cache


def test_what_one_block_does_alone_it_reads_by_vectors(plan):
    """The norms, the first of which looks up the embedding."""
    norms = [kernel for kernel in plan_kernels.kernels(plan) if "Sqrt" in kernel.name]
    assert len(norms) == 2 * LAYERS + 1 and "Gath" in norms[0].name
    assert all(kernel.vector > 1 for kernel in norms), norms


def test_products_read_vectors_and_compute_nothing_twice(plan):
    """A product's kernel has the bytes' rounding down, and neither the norm's root nor the gate before it."""
    products = [kernel for kernel in plan_kernels.kernels(plan) if "Floo" in kernel.name]
    assert len(products) == 4 * LAYERS
    for kernel in products:
        assert kernel.vector == 8, kernel
        source = plan_kernels.source(plan, kernel.name)
        assert "__myln_floor" in source and source.count("vtype<__myln_int8,8,8>*)live_inouts") == 1
        assert "__myln_sqrt" not in source and "__myln_exp" not in source


@pytest.mark.parametrize("form", ["packed", "packed, blocks of 64"])
def test_weights_are_unpacked_by_vectors(flavor, form):
    """Of matrices in several slices too, as K = 4096 is."""
    model, _ = search_projection.chain(search_projection.FORMS[form], 16, (4096, 2048), 1)
    unpacking = [kernel for kernel in plan_kernels.kernels(trial_plan.build(model)) if "Floo" in kernel.name]
    assert [kernel.vector for kernel in unpacking] == [8, 8]
