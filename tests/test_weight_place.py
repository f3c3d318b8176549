"""Where weights go where a build is not told."""

import families
import pytest

from llmtrt import build
from llmtrt.engine import weight_place
from llmtrt.engine.flavor import choose
from llmtrt.engine.gpu import Gpu, Gpus
from llmtrt.engine.options import BuildOptions
from llmtrt.quantization.pipeline import quantize
from llmtrt.quantization.recipe import Recipe


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """By what their matrices are: of blocks that can be inputs, of such that cannot, in another type, and not quantized."""
    folder = tmp_path_factory.mktemp("packages")
    checkpoint = families.save("llama-even", folder / "checkpoint")
    recipes = {"blocks of 64": Recipe("rtn", 64), "blocks of 16": Recipe("rtn", 16), "fp16": Recipe("none")}
    recipes["in bf16"] = Recipe("rtn", 64, "bfloat16")
    return {name: quantize(checkpoint, folder / name, recipe).package for name, recipe in recipes.items()}


def here(*capabilities: str) -> Gpus:
    gpus = tuple(Gpu(index, "GPU", capability, 1 << 35) for index, capability in enumerate(capabilities))
    return Gpus(gpus, problem="" if gpus else "there is none")


@pytest.mark.parametrize(
    "place, gpus, package, options",
    [
        ("inputs", ["9.0"], "blocks of 64", {}),
        ("inputs", ["9.0"], "blocks of 64", {"compute_capabilities": ("current",)}),
        ("plan", [], "blocks of 64", {}),
        ("plan", ["8.9", "9.0"], "blocks of 64", {}),
        ("plan", ["9.0"], "blocks of 64", {"compute_capabilities": ("8.9",)}),
        ("plan", ["9.0"], "blocks of 64", {"compute_capabilities": ("8.9", "current")}),
        ("plan", ["9.0"], "blocks of 16", {}),
        ("plan", ["9.0"], "fp16", {}),
        ("plan", ["9.0"], "in bf16", {}),
        ("plan", ["9.0"], "blocks of 64", {"max_batch": 2}),
        ("plan", ["9.0"], "blocks of 64", {"strip": True}),
        ("plan", ["9.0"], "blocks of 64", {"debug_tensors": ("logits",)}),
    ],
)
def test_inputs_only_where_they_were_faster(place, gpus, package, options, packages, monkeypatch):
    monkeypatch.setattr(weight_place, "find_gpus", lambda: here(*gpus))
    monkeypatch.setattr(weight_place, "_SMALLEST", 1)
    assert weight_place.weight_place(choose("rtx"), BuildOptions(**options), packages[package]) == place
    monkeypatch.setattr(weight_place, "_SMALLEST", 1 << 28)
    assert weight_place.weight_place(choose("rtx"), BuildOptions(**options), packages[package]) == "plan"


@pytest.mark.parametrize("capability, lowered", [("9.0", True), ("8.9", False)])
def test_a_build_goes_by_it(capability, lowered, packages, tmp_path, monkeypatch):
    monkeypatch.setattr(weight_place, "find_gpus", lambda: here(capability))
    monkeypatch.setattr(weight_place, "_SMALLEST", 1)
    built = build(packages["blocks of 64"].path, tmp_path / "engine", max_seq=64)
    assert ("weight_inputs" in built.engine.manifest["lowerings"]) == lowered
