"""Every name of TensorRT's Python API that llmtrt uses exists in the real bindings, those that cannot run here too.

tests/bindings/*.json was made by tools/list_bindings.py from the wheels that they are named after.
"""

import ast
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmtrt.engine.flavor import Flavor, choose, describe
from llmtrt.engine.manifest import Engine

SOURCE = Path(__file__).parents[1] / "llmtrt"
LISTINGS = {path.stem: json.loads(path.read_text()) for path in (Path(__file__).parent / "bindings").glob("*.json")}

# What each variable of a file is. Attributes of our own Engine are not TensorRT's, though it shares a variable's name.
VARIABLES = {
    "refit.py": {"refitter": "Refitter", "parser": "OnnxParserRefitter"},
    "build.py": {"builder": "Builder", "config": "IBuilderConfig", "network": "INetworkDefinition"},
    "parse.py": {"parser": "OnnxParser", "error": "ParserError"},
    "profiles.py": {"builder": "Builder", "config": "IBuilderConfig"},
    "tensorrt.py": {
        "config": "IRuntimeConfig",
        "context": "IExecutionContext",
        "engine": "ICudaEngine",
        "self._engine": "ICudaEngine",
        "self._runtime": "Runtime",
    },
}
MODULES = ("trt", "flavor.module", "self._flavor.module")
OURS = {name for name in dir(Engine)} | set(Engine.__dataclass_fields__)

# Used only where the flavor says that it can: (class, member or None for all of it) → capability.
GUARDED = {
    ("IBuilderConfig", "set_compute_capability"): "builds_without_gpu",
    ("IBuilderConfig", "num_compute_capabilities"): "builds_without_gpu",
    ("ComputeCapability", None): "builds_without_gpu",
    ("IRuntimeConfig", None): "runtime_config",
    ("ICudaEngine", "create_runtime_config"): "runtime_config",
    ("IRuntimeConfig", "cuda_graph_strategy"): "cuda_graphs",
    ("CudaGraphStrategy", None): "cuda_graphs",
    ("IRuntimeConfig", "dynamic_shapes_kernel_specialization_strategy"): "kernel_specialization",
    ("DynamicShapesKernelSpecializationStrategy", None): "kernel_specialization",
    ("EngineInvalidityDiagnostics", None): "engine_validity",
    ("Runtime", "get_engine_validity"): "engine_validity",
}


def touched(file: Path, text: str | None = None) -> set[tuple[str, str | None]]:
    """(class, member) of all that a source file takes from TensorRT; (class, None) where it takes the class."""
    variables, found = VARIABLES.get(file.name, {}), set()
    for node in ast.walk(ast.parse(text or file.read_text())):
        if not isinstance(node, ast.Attribute) or node.attr.startswith("_"):
            continue
        base = ast.unparse(node.value)
        if base in variables and not (base == "engine" and node.attr in OURS):
            found.add((variables[base], node.attr))
        elif base in MODULES and node.attr[0].isupper():
            found.add((node.attr, None))
        elif base.startswith("trt.") and base.count(".") == 1:
            found.add((base.removeprefix("trt."), node.attr))
    return found


def flavor_of(listing: dict) -> Flavor:
    """The flavor that a listing describes, as flavor.py would see it."""
    classes = {
        name: SimpleNamespace(**dict.fromkeys(members), __members__=dict.fromkeys(members))
        for name, members in listing["classes"].items()
    }
    return describe(listing["wheel"], SimpleNamespace(**classes))


def missing(names: set[tuple[str, str | None]], listing: dict) -> list[str]:
    flavor, classes = flavor_of(listing), listing["classes"]
    wanted = {
        (kind, member)
        for kind, member in names
        if all(flavor.can(capability) for key in ((kind, member), (kind, None)) if (capability := GUARDED.get(key)))
    }
    return sorted(
        f"{kind}.{member}" if member else kind
        for kind, member in wanted
        if kind not in classes or (member and member not in classes[kind])
    )


BUILDING = sorted((SOURCE / "engine").glob("*.py"))
RUNNING = [SOURCE / "runtime" / "tensorrt.py", SOURCE / "engine" / "logger.py"]


def test_the_listings_are_of_the_versions_that_llmtrt_speaks_of():
    found = {(name.split("_cu")[0], ".".join(name.split("-")[1].split(".")[:2])) for name in LISTINGS}
    assert found == {
        ("tensorrt", "10.16"),
        ("tensorrt", "11.4"),
        ("tensorrt_lean", "11.4"),
        ("tensorrt_rtx", "1.6"),
        ("tensorrt_rtx", "1.7"),
    }


def test_the_source_is_seen():
    names = set().union(*(touched(file) for file in [*BUILDING, *RUNNING]))
    assert {("Builder", "create_network"), ("IExecutionContext", "execute_async_v3"), ("OnnxParser", None)} <= names
    assert len(names) > 45


@pytest.mark.parametrize("name", LISTINGS)
def test_every_name_that_is_used_exists(name):
    listing = LISTINGS[name]
    files = RUNNING if "lean" in name else [*BUILDING, *RUNNING]
    assert {file.name: missing(touched(file), listing) for file in files} == {file.name: [] for file in files}


@pytest.mark.parametrize("line", ["builder.build_engine(network)", "trt.BuilderFlags.REFIT", "trt.BuilderFlag.FP17"])
def test_a_misspelt_name_would_be_found(line):
    names = touched(SOURCE / "engine" / "build.py", line)
    assert all(missing(names, listing) for name, listing in LISTINGS.items() if "lean" not in name)


def test_a_listing_over_stubs_is_what_the_library_itself_gives():
    """Of the one version that is installed here with its library."""
    flavor = choose("rtx")
    name = next((name for name in LISTINGS if name.endswith(flavor.version) and "rtx" in name), None)
    if name is None:
        pytest.skip(f"TensorRT-RTX {flavor.version} is installed, which has no listing")
    for kind, members in LISTINGS[name]["classes"].items():
        real = getattr(flavor.module, kind)
        assert members == sorted(member for member in dir(real) if not member.startswith("_")), kind
    listed = flavor_of(LISTINGS[name])
    assert listed.capabilities == flavor.capabilities
    assert sorted(listed.targets) == sorted(flavor.targets)


def test_what_the_flavors_can_do():
    able = {name: flavor_of(listing).capabilities for name, listing in LISTINGS.items()}

    def those_that_can(capability: str) -> set[str]:
        return {name.split("_cu")[0] for name, capabilities in able.items() if capability in capabilities}

    assert those_that_can("run") == {"tensorrt", "tensorrt_lean", "tensorrt_rtx"}
    assert those_that_can("build") == {"tensorrt", "tensorrt_rtx"}
    assert those_that_can("builds_without_gpu") == those_that_can("runtime_cache") == {"tensorrt_rtx"}
    assert those_that_can("plugins") == {"tensorrt"}
