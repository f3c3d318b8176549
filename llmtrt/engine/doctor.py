"""What this machine can do: runtimes, TensorRT flavors, GPUs, and the command that installs what is missing."""

import importlib
import importlib.metadata
import platform
import re
from dataclasses import asdict, dataclass

from llmtrt.engine.flavor import CAPABILITIES, Flavor, Missing, find_flavors
from llmtrt.engine.gpu import Gpu, find_gpus
from llmtrt.engine.installed import PRODUCTS, Installed, folder_of
from llmtrt.runtime.cuda import INSTALL
from llmtrt.runtime.onnxruntime import MINIMUM_VERSION


@dataclass(frozen=True)
class Library:
    """A Python package that llmtrt needs for some verb; ``module`` is the name that it is imported by. The minimums are
    those of pyproject.toml."""

    name: str
    module: str
    minimum: tuple[int, ...]
    purpose: str

    @property
    def requirement(self) -> str:
        return f"{self.name}>={'.'.join(map(str, self.minimum))}"


_PIP = "pip install "
_WRITES = "quantizes checkpoints, writes graphs"
LIBRARIES = (
    Library("onnxruntime", "onnxruntime", MINIMUM_VERSION, "runs packages on the CPU"),
    Library("onnx", "onnx", (1, 20), _WRITES),
    Library("onnx_ir", "onnx_ir", (1, 0), _WRITES),
    Library("ml_dtypes", "ml_dtypes", (0, 5), _WRITES),
    Library("pyyaml", "yaml", (6,), "reads recipes"),
    Library("gguf", "gguf", (0, 17), "reads GGUF checkpoints"),
)
_QUANTIZE = ("onnx", "onnx_ir", "ml_dtypes", "pyyaml")
_BUILD = ("onnx", "onnx_ir", "ml_dtypes")


@dataclass(frozen=True)
class Component:
    """A library: ``version`` is empty where it is missing or does not load; ``problem`` then says why, and
    ``command`` installs it. ``abilities`` are sentences' ends for a person ("builds engines from ONNX")."""

    name: str
    purpose: str
    version: str = ""
    abilities: tuple[str, ...] = ()
    problem: str = ""
    command: str = ""


@dataclass(frozen=True)
class GpuFacts:
    """A GPU and the flavors that can run on it: name → "yes" or why it is in doubt."""

    gpu: Gpu
    flavors: dict[str, str]


@dataclass(frozen=True)
class Facts:
    """``components`` in the order in which a person meets them; ``gpu_problem`` is empty where there are GPUs;
    ``verdict`` says in sentences what works here."""

    python: str
    platform: str
    components: tuple[Component, ...]
    driver: str
    cuda: str
    gpus: tuple[GpuFacts, ...]
    gpu_problem: str
    verdict: tuple[str, ...]

    def to_json(self) -> dict:
        return asdict(self)


def examine() -> Facts:
    """Looks at this machine. It imports the libraries it reports on, one version of each, and makes no CUDA context.

    Raises UserError where LLMTRT_TENSORRT lists something else than folders, and nothing else.
    """
    flavors, found = find_flavors(), find_gpus()
    usable = [flavor for flavor in flavors if isinstance(flavor, Flavor)]
    components = (*map(_library, LIBRARIES), *map(_component, flavors), _cuda_bindings())
    gpus = tuple(GpuFacts(gpu, {flavor.name: _fit(flavor, gpu) for flavor in usable}) for gpu in found.gpus)
    return Facts(
        platform.python_version(),
        f"{platform.system()} {platform.machine()}",
        components,
        found.driver,
        found.cuda,
        gpus,
        found.problem,
        _verdict(components, usable, gpus, found.problem),
    )


def _library(library: Library) -> Component:
    version, problem = _import(library.module)
    if version == "unknown":
        version = _installed_version(library.name)
    numbers = tuple(map(int, re.findall(r"\d+", version)))
    if numbers and numbers < library.minimum:
        version, problem = "", f"too old: {version} instead of {library.requirement}"
    command = f"{_PIP}'{library.requirement}'" if problem else ""
    return Component(library.name, library.purpose, version, (), problem, command)


def _installed_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _cuda_bindings() -> Component:
    version, problem = _import("cuda.bindings", "cuda.bindings.runtime")
    return Component(
        "cuda-bindings",
        "moves data to and from the GPU",
        version,
        ("runs engines, with a TensorRT",) if version else (),
        problem,
        INSTALL if problem else "",
    )


def _import(name: str, *more: str) -> tuple[str, str]:
    """The version of a module, or why it does not import."""
    try:
        module = importlib.import_module(name)
        for other in more:
            importlib.import_module(other)
    except ModuleNotFoundError as error:
        is_absent = f"{name}.".startswith(f"{error.name}.")
        return "", "not installed" if is_absent else f"does not load: it needs {error.name}"
    except Exception as error:  # noqa: BLE001 - whatever a broken installation makes it raise is the finding
        return "", f"does not load: {' '.join(str(error).split())}"
    return str(getattr(module, "__version__", "unknown")), ""


def _component(flavor: Flavor | Missing | Installed) -> Component:
    name, purpose = f"TensorRT {flavor.name}", PRODUCTS[flavor.name].purpose
    if isinstance(flavor, Missing):
        return Component(name, purpose, problem=flavor.reason, command=flavor.command)
    if isinstance(flavor, Installed):
        return Component(name, purpose, flavor.version, (f"lies in {flavor.folder}, not imported",))
    abilities = tuple(text for key, (text, _) in CAPABILITIES.items() if flavor.can(key))
    if flavor.targets:
        abilities += (f"targets compute capability {', '.join(flavor.targets)}",)
    if folder := folder_of(flavor.module):
        abilities += (f"lies in {folder}",)
    return Component(name, purpose, flavor.version, abilities)


def _fit(flavor: Flavor, gpu: Gpu) -> str:
    if not flavor.targets:
        return "yes"
    major = gpu.compute_capability.split(".")[0]
    if any(target.split(".")[0] == major for target in flavor.targets):
        return "yes"
    return f"not promised: it supports {', '.join(flavor.targets)}"


def _verdict(
    components: tuple[Component, ...], usable: list[Flavor], gpus: tuple[GpuFacts, ...], gpu_problem: str
) -> tuple[str, ...]:
    state = {component.name: component for component in components}
    lines = []
    lacks = _lacking(state, "onnxruntime")
    lines.append(f"packages do not run: {lacks}" if lacks else "packages run on ONNX Runtime")
    if lacks := _lacking(state, *_QUANTIZE):
        lines.append(f"packages cannot be made: {lacks}")
    else:
        lacks = _lacking(state, "gguf")
        lines.append(f"packages can be made, but not of GGUF files: {lacks}" if lacks else "packages can be made")
    builders = [flavor for flavor in usable if flavor.can("build") and (gpus or flavor.can("builds_without_gpu"))]
    lacks = _lacking(state, *_BUILD)
    if builders and not lacks:
        names = ", ".join(f"TensorRT {flavor.name} {flavor.version}" for flavor in builders)
        lines.append(
            f"engines can be built with {names}" + ("" if gpus else ", ahead of time, without strip and refit")
        )
    else:
        commands = [part.command for part in components if part.name.startswith("TensorRT") and part.command]
        tensorrt = "" if builders else f"`{commands[0]}`" if commands else "there is no GPU"
        lines.append(f"engines cannot be built: {'; '.join(filter(None, (tensorrt, lacks)))}")
    if gpu_problem:
        lines.append(f"engines cannot run: {gpu_problem}")
    elif not usable:
        lines.append("engines cannot run: no TensorRT is installed")
    elif lacks := _lacking(state, "cuda-bindings"):
        lines.append(f"engines cannot run: {lacks}")
    else:
        lines.append("engines can run")
    return tuple(lines)


def _lacking(state: dict[str, Component], *names: str) -> str:
    """What is wrong with these components and the one command that mends it; empty where they are all here."""
    broken = [state[name] for name in names if state[name].problem]
    if not broken:
        return ""
    command = _PIP + " ".join(part.command.removeprefix(_PIP) for part in broken)
    return f"{', '.join(f'{part.name} ({part.problem})' for part in broken)}: `{command}`"
