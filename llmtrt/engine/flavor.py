"""TensorRT flavors: the one place that imports TensorRT, and what each flavor found can do.

``tensorrt`` and ``tensorrt_rtx`` share one Python API. What differs is detected from the module, never from its name.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from llmtrt.errors import UserError


@dataclass(frozen=True)
class Flavor:
    """A TensorRT that imports. ``capabilities`` are names of ``CAPABILITIES``; ``targets`` are the compute capabilities
    that it builds for ahead of time ("8.6"), empty where it builds for the GPU at hand alone."""

    name: str
    version: str
    module: ModuleType
    capabilities: frozenset[str]
    targets: tuple[str, ...] = ()

    def can(self, capability: str) -> bool:
        return capability in self.capabilities


@dataclass(frozen=True)
class Missing:
    """A flavor that does not import: why, in a sentence, and the command that installs it."""

    name: str
    reason: str
    command: str


# The module names a flavor may have, and how it is installed. RTX's bindings wheel alone, without the source package
# around it that adds the plain name, is importable under its own.
_MODULES = {
    "rtx": (("tensorrt_rtx", "tensorrt_rtx_bindings"), "pip install tensorrt-rtx-cu12-bindings tensorrt-rtx-cu12-libs"),
    "tensorrt": (("tensorrt", "tensorrt_bindings"), "pip install tensorrt"),
}

NAMES = tuple(_MODULES)

_Test = Callable[[Any], bool]

# What a capability is called here, what it is to a person, and how the module shows that it has it.
CAPABILITIES: dict[str, tuple[str, _Test]] = {
    "build": ("builds engines from ONNX", lambda m: hasattr(m, "Builder") and hasattr(m, "OnnxParser")),
    "builds_without_gpu": (
        "builds ahead of time, without a GPU",
        lambda m: hasattr(_type(m, "IBuilderConfig"), "set_compute_capability"),
    ),
    "run": ("runs engines", lambda m: hasattr(m, "Runtime") and hasattr(m, "ICudaEngine")),
    "refit": ("changes weights of an engine (needs a GPU)", lambda m: hasattr(m, "Refitter") and _flag(m, "REFIT")),
    "refit_identical": ("refits the weights it was built with", lambda m: _flag(m, "REFIT_IDENTICAL")),
    "strip": ("builds engines without weights (needs a GPU)", lambda m: _flag(m, "STRIP_PLAN")),
    "weight_streaming": ("streams weights from host memory", lambda m: _flag(m, "WEIGHT_STREAMING")),
    "user_memory": (
        "takes its activation memory from the caller",
        lambda m: hasattr(_type(m, "ExecutionContextAllocationStrategy"), "USER_MANAGED"),
    ),
    "runtime_config": ("has runtime settings", lambda m: hasattr(_type(m, "ICudaEngine"), "create_runtime_config")),
    "cuda_graphs": ("captures CUDA graphs by itself", lambda m: hasattr(m, "CudaGraphStrategy")),
    "runtime_cache": ("keeps compiled kernels in a file", lambda m: hasattr(m, "IRuntimeCache")),
    "kernel_specialization": (
        "compiles kernels for the shapes it sees",
        lambda m: hasattr(m, "DynamicShapesKernelSpecializationStrategy"),
    ),
    "engine_validity": (
        "tells why an engine does not fit",
        lambda m: hasattr(_type(m, "Runtime"), "get_engine_validity"),
    ),
    "kv_cache_update": (
        "updates a KV cache in place",
        lambda m: hasattr(_type(m, "INetworkDefinition"), "add_kv_cache_update"),
    ),
    "plugins": ("takes plugins", lambda m: hasattr(_type(m, "INetworkDefinition"), "add_plugin_v3")),
}


def _type(module: ModuleType, name: str) -> object:
    return getattr(module, name, None)


def _flag(module: ModuleType, name: str) -> bool:
    return hasattr(_type(module, "BuilderFlag"), name)


def find_flavors() -> list[Flavor | Missing]:
    """Every flavor that llmtrt knows, in the order of preference, imported or with the reason why not."""
    return [_find(name) for name in NAMES]


def _find(name: str) -> Flavor | Missing:
    modules, command = _MODULES[name]
    for module_name in modules:
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name == module_name:
                continue
            return Missing(name, f"{module_name} does not load: it needs the Python module {error.name}", command)
        except Exception as error:  # noqa: BLE001 - a shared library missing, another ABI, a wheel that checks more
            return Missing(name, f"{module_name} does not load: {_line(error)}", command)
        if hasattr(module, "Runtime"):
            return describe(name, module)
    return Missing(name, f"the Python module {modules[0]} is not installed", command)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def describe(name: str, module: ModuleType) -> Flavor:
    """The flavor that ``module`` is, as its own attributes show."""
    capabilities = frozenset(key for key, (_, test) in CAPABILITIES.items() if test(module))
    members = getattr(_type(module, "ComputeCapability"), "__members__", ())
    targets = tuple(f"{member[2:-1]}.{member[-1]}" for member in members if member.startswith("SM"))
    return Flavor(name, str(getattr(module, "__version__", "unknown")), module, capabilities, targets)


def choose(name: str = "auto", need: str = "build") -> Flavor:
    """The flavor ``name``, or with ``auto`` the first one here that has the capability ``need``.

    Raises UserError with the reason and the command that installs it.
    """
    if name not in ("auto", *NAMES):
        raise UserError(f"there is no TensorRT flavor {name!r}: choose auto, {' or '.join(NAMES)}")
    found = find_flavors() if name == "auto" else [_find(name)]
    for flavor in found:
        if isinstance(flavor, Flavor) and flavor.can(need):
            return flavor
    if name == "auto":
        reasons = "; ".join(
            f"{flavor.name}: {flavor.reason if isinstance(flavor, Missing) else f'{flavor.version} cannot {need}'}"
            for flavor in found
        )
        raise UserError(f"no TensorRT here that can {need} ({reasons}): install one with `{_MODULES[NAMES[0]][1]}`")
    (flavor,) = found
    if isinstance(flavor, Missing):
        raise UserError(f"TensorRT flavor {name}: {flavor.reason}: install it with `{flavor.command}`")
    raise UserError(f"TensorRT flavor {name} {flavor.version} cannot {need}: install it with `{_MODULES[name][1]}`")
