"""TensorRT flavors: the one place that imports TensorRT, and what each flavor found can do.

All flavors share one Python API. What differs is detected from the module, never from its name.
"""

import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from llmtrt.engine.installed import (
    NAMES,
    PRODUCTS,
    UNKNOWN,
    Installed,
    advice,
    find_installed,
    first_on_path,
    folder_of,
    install_command,
    mixed_with,
    runs,
)
from llmtrt.errors import CannotRunHere, UserError


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

    def runs(self, built_by: str, version: str, version_compatible: bool) -> str:
        """Why it does not run engines that ``version`` of the flavor ``built_by`` made, as the rest of a sentence about
        the engine; empty if it does."""
        if runs(self.name, self.version, built_by, version, version_compatible):
            return ""
        here = self.version if self.name == built_by else f"{self.name} {self.version}"
        return (
            f"was built with TensorRT {built_by} {version} and {here} is installed: install that version or build the "
            "engine anew"
        )


@dataclass(frozen=True)
class Missing:
    """A flavor that does not import: why, in a sentence, and the command that installs it."""

    name: str
    reason: str
    command: str


def _builds(module: ModuleType) -> bool:
    return hasattr(module, "Builder") and hasattr(module, "OnnxParser")


def _refits(module: ModuleType) -> bool:
    return hasattr(module, "Refitter") and hasattr(module, "OnnxParserRefitter")


def _type(module: ModuleType, name: str) -> object:
    return getattr(module, name, None)


def _flag(module: ModuleType, name: str) -> bool:
    return hasattr(_type(module, "BuilderFlag"), name)


_Test = Callable[[Any], bool]

# What a capability is called here, what it is to a person, and how the module shows that it has it.
CAPABILITIES: dict[str, tuple[str, _Test]] = {
    "build": ("builds engines from ONNX", _builds),
    "builds_without_gpu": (
        "builds ahead of time, without a GPU",
        lambda m: hasattr(_type(m, "IBuilderConfig"), "set_compute_capability"),
    ),
    "run": ("runs engines", lambda m: hasattr(m, "Runtime") and hasattr(m, "ICudaEngine")),
    "refit": ("changes weights of an engine (needs a GPU)", lambda m: _refits(m) and _flag(m, "REFIT")),
    "refit_identical": ("refits the weights it was built with", lambda m: _refits(m) and _flag(m, "REFIT_IDENTICAL")),
    "strip": ("builds engines without weights (needs a GPU)", lambda m: _builds(m) and _flag(m, "STRIP_PLAN")),
    "version_compatible": (
        "builds engines for later versions and the lean runtime",
        # TensorRT-RTX has the flag, too, but a lean runtime that the build then asks for does not exist; without one it
        # writes the usual plan. A module that counts another version among the reasons against an engine means it.
        lambda m: (
            _builds(m)
            and _flag(m, "VERSION_COMPATIBLE")
            and not hasattr(_type(m, "EngineInvalidityDiagnostics"), "VERSION_MISMATCH")
        ),
    ),
    "host_code": (
        "can be told to trust plans that carry host code",
        lambda m: hasattr(_type(m, "Runtime"), "engine_host_code_allowed"),
    ),
    "weight_streaming": (
        "streams weights from host memory",
        lambda m: _flag(m, "WEIGHT_STREAMING") and hasattr(_type(m, "ICudaEngine"), "weight_streaming_budget_v2"),
    ),
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
        "builds graphs that update a KV cache in place",
        lambda m: hasattr(_type(m, "INetworkDefinition"), "add_kv_cache_update"),
    ),
    "empty_branches": (
        "compiles a profile without what has no rows in it",
        # Measured on TensorRT-RTX 1.6; no machine here runs another flavor's builder.
        lambda m: _builds(m) and hasattr(m, "DynamicShapesKernelSpecializationStrategy"),
    ),
    "plugins": ("takes plugins", lambda m: hasattr(_type(m, "INetworkDefinition"), "add_plugin_v3")),
}


def find_flavors() -> list[Flavor | Missing | Installed]:
    """Every flavor that llmtrt knows, in the order of preference: imported or with the reason why not, each followed by
    its other versions, which are not imported."""
    found: list[Flavor | Missing | Installed] = []
    for name in NAMES:
        first, versions = _find(name), find_installed(name)
        used = folder_of(first.module) if isinstance(first, Flavor) else versions[0].folder if versions else ""
        found += [first, *(version for version in versions if version.folder != used)]
    return found


def describe(name: str, module: ModuleType) -> Flavor:
    """The flavor that ``module`` is, as its own attributes show."""
    capabilities = frozenset(key for key, (_, test) in CAPABILITIES.items() if test(module))
    members = getattr(_type(module, "ComputeCapability"), "__members__", ())
    targets = tuple(f"{member[2:-1]}.{member[-1]}" for member in members if member.startswith("SM"))
    return Flavor(name, str(getattr(module, "__version__", UNKNOWN)), module, capabilities, targets)


def choose(name: str = "auto", need: str = "build") -> Flavor:
    """The flavor ``name``, or with ``auto`` the first one here, that has the capability ``need``. A name may end in a
    version, whole or its beginning: ``rtx==1.7``.

    Raises UserError with the reason and the command that installs it.
    """
    name, version = _parse(name)
    reasons = {}
    for each in NAMES if name == "auto" else (name,):
        found = _find(each, lambda here: f"{here}.".startswith(f"{version}.")) if version else _find(each)
        if isinstance(found, Flavor) and found.can(need):
            return found
        reasons[each] = found.reason if isinstance(found, Missing) else f"{found.version} does not"
    wanted = CAPABILITIES[need][0]
    if name == "auto":
        told = "; ".join(f"{each}: {reason}" for each, reason in reasons.items())
        raise UserError(f"no TensorRT here that {wanted} ({told}): install one with `{install_command(NAMES[0])}`")
    if isinstance(found, Flavor):
        raise UserError(f"TensorRT flavor {name} {found.version} is none that {wanted}: choose another flavor")
    asked = f"{name}=={version}" if version else name
    raise UserError(f"TensorRT flavor {asked}: {found.reason}: {advice(name, version and f'=={version}.*')}")


def choose_for(engine_flavor: str, version: str, version_compatible: bool, engine: str = "the engine") -> Flavor:
    """The first TensorRT here that runs what ``version`` of the flavor ``engine_flavor`` built; ``engine`` names it in
    messages.

    Raises CannotRunHere with the reason and the command that installs the right one.
    """
    built = f"{engine} was built with TensorRT {engine_flavor} {version}"
    if engine_flavor not in NAMES:
        raise UserError(f"{built}, a flavor that llmtrt does not know: build it anew")
    reasons = {}
    for name in NAMES:
        if not runs(name, version, engine_flavor, version, version_compatible):
            continue
        found = _find(name, lambda here, name=name: runs(name, here, engine_flavor, version, version_compatible))
        if isinstance(found, Flavor):
            return found
        reasons[name] = found.reason
    told = reasons.pop(engine_flavor) + "".join(f"; {name}: {reason}" for name, reason in reasons.items())
    raise CannotRunHere(f"{built} and {told}: {advice(engine_flavor, f'=={version}')}, or build the engine anew")


def _parse(text: str) -> tuple[str, str]:
    """Name and version, empty where none is asked for, of ``auto``, ``rtx`` or ``rtx==1.7``."""
    match = re.fullmatch(r"(\w+)(?:==(\d+(?:\.\w+)*))?", text)
    if text != "auto" and not (match and match[1] in NAMES):
        raise UserError(
            f"there is no TensorRT flavor {text!r}: choose {_alternatives(('auto', *NAMES))}, or one version of a flavor "
            f"as in {NAMES[0]}==1.7"
        )
    return match[1], match[2] or ""


def _alternatives(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _find(name: str, fits: Callable[[str], bool] = lambda version: True) -> Flavor | Missing:
    """The first installed version of a flavor that ``fits``, imported.

    Raises UserError where this process has imported another one.
    """
    product, versions = PRODUCTS[name], find_installed(name)
    here = dict.fromkeys(one.version for one in versions)
    loaded = next((module for module in map(sys.modules.get, product.modules) if hasattr(module, "Runtime")), None)
    if loaded is not None:
        flavor = describe(name, loaded)
        if fits(flavor.version):
            return flavor
        if other := next(filter(fits, here), None):
            raise UserError(
                f"TensorRT {name} {other} cannot be used in this process, which has imported {flavor.version} and can "
                "hold one version: start another process for it"
            )
        here = {flavor.version: None} | here
    elif one := next((one for one in versions if one.version == UNKNOWN or fits(one.version)), None):
        return _load(one, fits)
    reason = f"the Python module {product.module} is not installed"
    if here:
        reason = f"{', '.join(here)} {'are' if len(here) > 1 else 'is'} installed"
    return Missing(name, reason, install_command(name))


def _load(installed: Installed, fits: Callable[[str], bool]) -> Flavor | Missing:
    name, module, command = installed.name, installed.module, install_command(installed.name)
    if reason := mixed_with(installed):
        return Missing(name, reason, command)
    try:
        with first_on_path(installed.folder):
            flavor = describe(name, importlib.import_module(module))
    except ModuleNotFoundError as error:
        if error.name == module:
            return Missing(name, f"the Python module {module} is not installed", command)
        return Missing(name, f"{module} does not load: it needs the Python module {error.name}", command)
    except Exception as error:  # noqa: BLE001 - a shared library missing, another ABI, a wheel that checks more
        return Missing(name, f"{module} does not load: {_line(error)}", command)
    if not hasattr(flavor.module, "Runtime"):
        return Missing(name, f"{module} in {installed.folder} is not TensorRT's", command)
    if not fits(flavor.version):
        return Missing(name, f"{flavor.version} is installed", command)
    return flavor


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
