"""What this machine can do: runtimes, TensorRT flavors, GPUs, and the command that installs what is missing."""

import importlib
import platform
from dataclasses import asdict, dataclass

from llmtrt.engine.flavor import CAPABILITIES, Flavor, find_flavors
from llmtrt.engine.gpu import Gpu, find_gpus
from llmtrt.runtime.cuda import INSTALL
from llmtrt.runtime.onnxruntime import MINIMUM_VERSION


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
    """Looks at this machine. It imports the libraries it reports on, makes no CUDA context and raises nothing."""
    flavors, found = find_flavors(), find_gpus()
    usable = [flavor for flavor in flavors if isinstance(flavor, Flavor)]
    components = (_onnxruntime(), *map(_component, flavors), _cuda_bindings())
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


def _onnxruntime() -> Component:
    purpose, command = "runs packages on the CPU", f"pip install 'onnxruntime>={'.'.join(map(str, MINIMUM_VERSION))}'"
    version, problem = _import("onnxruntime")
    if version and tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < MINIMUM_VERSION:
        return Component("onnxruntime", purpose, version, problem="too old for opset 24", command=command)
    return Component(
        "onnxruntime", purpose, version, ("runs packages",) if version else (), problem, command if problem else ""
    )


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
        return "", "not installed" if name.startswith(error.name or "") else f"does not load: it needs {error.name}"
    except Exception as error:  # noqa: BLE001 - whatever a broken installation makes it raise is the finding
        return "", f"does not load: {' '.join(str(error).split())}"
    return str(getattr(module, "__version__", "unknown")), ""


def _component(flavor: object) -> Component:
    purpose = "builds and runs engines"
    if isinstance(flavor, Flavor):
        abilities = tuple(text for key, (text, _) in CAPABILITIES.items() if flavor.can(key))
        if flavor.targets:
            abilities += (f"targets compute capability {', '.join(flavor.targets)}",)
        return Component(f"TensorRT {flavor.name}", purpose, flavor.version, abilities)
    return Component(f"TensorRT {flavor.name}", purpose, problem=flavor.reason, command=flavor.command)


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
    ort = state["onnxruntime"]
    lines.append(
        "packages run on ONNX Runtime"
        if not ort.problem
        else f"packages do not run: ONNX Runtime is {ort.problem} (`{ort.command}`)"
    )
    builders = [flavor for flavor in usable if flavor.can("build") and (gpus or flavor.can("builds_without_gpu"))]
    if builders:
        names = ", ".join(f"TensorRT {flavor.name} {flavor.version}" for flavor in builders)
        lines.append(
            f"engines can be built with {names}" + ("" if gpus else ", ahead of time, without strip and refit")
        )
    else:
        missing = next(
            (component for component in components if component.name.startswith("TensorRT") and component.command), None
        )
        lines.append("engines cannot be built" + (f": `{missing.command}`" if missing else " without a GPU"))
    if gpu_problem:
        lines.append(f"engines cannot run: {gpu_problem}")
    elif not usable:
        lines.append("engines cannot run: no TensorRT is installed")
    elif state["cuda-bindings"].problem:
        bindings = state["cuda-bindings"]
        lines.append(f"engines cannot run: cuda-bindings is {bindings.problem} (`{bindings.command}`)")
    else:
        lines.append("engines can run")
    return tuple(lines)
