"""From a package to an engine: the graph lowered for a TensorRT flavor, parsed, compiled, written with its manifest."""

import os
import resource
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrt import files
from llmtrt.engine.flavor import Flavor, choose
from llmtrt.engine.gpu import find_gpus
from llmtrt.engine.logger import make_logger
from llmtrt.engine.manifest import ENGINE, PLAN, REFIT_GRAPH, Engine, open_engine
from llmtrt.engine.monitor import make_monitor
from llmtrt.engine.parse import parse
from llmtrt.engine.profiles import Profile, add_profiles, make_profiles
from llmtrt.errors import UserError
from llmtrt.manifest import write_manifest
from llmtrt.package import Package, open_package
from llmtrt.progress import Report, silent

if TYPE_CHECKING:
    import onnx_ir as ir

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# LAZY would swap kernels, and with them the last bits of every number, while a person waits; EAGER compiles for every
# new shape. NONE is the same kernels always.
KERNEL_SPECIALIZATION = "NONE"


@dataclass(frozen=True)
class Built:
    """What ``build`` made and what it took; ``peak_host_bytes`` is the process's peak so far."""

    engine: Engine
    seconds: float
    peak_host_bytes: int


@dataclass(frozen=True)
class _Options:
    max_batch: int
    max_seq: int
    chunk: int
    targets: tuple[str, ...]
    flags: tuple[str, ...]

    @property
    def capacity(self) -> int:
        return self.max_seq + self.chunk


def build(
    package_path: str | Path,
    output: str | Path,
    flavor: str = "auto",
    *,
    max_batch: int = 1,
    max_seq: int | None = None,
    chunk: int = 512,
    compute_capabilities: tuple[str, ...] = (),
    weight_streaming: bool = False,
    strip: bool = False,
    refit: bool = False,
    verify: bool = True,
    report: Report = silent,
) -> Built:
    """Builds the package in ``package_path`` into an engine in the new folder ``output``.

    The KV cache of each of ``max_batch`` sequences has ``max_seq + chunk`` rows; ``max_seq`` is the package's context
    unless it is given, ``chunk`` the most tokens of one prefill step. ``compute_capabilities`` ("8.9", …, or "current")
    narrows the GPUs that it runs on; without, a flavor that builds ahead of time makes one plan for all of 8.0 and
    later, and any other for the GPU at hand.

    ``strip`` leaves the weights in the package, from where they are refitted when the engine is loaded; it needs a GPU,
    and the package has to stay where it is, seen from the engine.

    Raises UserError, with nothing written, for a flavor that is missing, a flavor or a flag that needs a GPU where there
    is none, a graph that TensorRT refuses (naming the nodes), a failed build (with TensorRT's reason) and a full disk.
    """
    import onnx_ir as ir

    start, output = time.monotonic(), Path(output)
    trt = choose(flavor)
    if not trt.can("builds_without_gpu") and (problem := find_gpus().problem):
        raise UserError(
            f"TensorRT {trt.name} {trt.version} builds only where there is an NVIDIA GPU, but {problem}: build on a machine "
            "with one, or ahead of time with --flavor rtx"
        )
    flags = _flags(trt, weight_streaming, strip, refit)
    targets = _targets(trt, compute_capabilities)
    package = open_package(package_path, verify)
    max_seq = _size("max_seq", package.spec.max_seq if max_seq is None else max_seq, package.spec.max_seq)
    options = _Options(
        _size("max_batch", max_batch, 1 << 16), max_seq, min(max_seq, _size("chunk", chunk, 1 << 20)), targets, flags
    )
    with files.staged_folder(output) as folder:
        model, lowerings = _lowered(package, trt, options)
        graph = ir.to_proto(model).SerializeToString()  # its weights stay in the package's file
        profiles = _write_plan(trt, package, graph, options, folder / PLAN, report)
        if "STRIP_PLAN" in flags:
            (folder / REFIT_GRAPH).write_bytes(graph)
        for name in _TOKENIZER:
            if name in package.manifest["files"]:
                shutil.copyfile(package.path / name, folder / name)
        _write_manifest(folder, output, trt, package, options, profiles, lowerings)
    report(1, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Built(open_engine(output, verify=False), time.monotonic() - start, peak)


def _size(name: str, value: object, limit: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= limit:
        raise UserError(f"--{name.replace('_', '-')} should be an integer from 1 to {limit}, but is {value!r}")
    return value


def _flags(flavor: Flavor, weight_streaming: bool, strip: bool, refit: bool) -> tuple[str, ...]:
    wanted = {
        "WEIGHT_STREAMING": ("weight_streaming", weight_streaming),
        "STRIP_PLAN": ("strip", strip),
        "REFIT": ("refit", refit),
        "REFIT_IDENTICAL": ("refit_identical", strip and not refit),
    }
    chosen = {flag: capability for flag, (capability, on) in wanted.items() if on}
    for capability in chosen.values():
        if not flavor.can(capability):
            raise UserError(
                f"TensorRT {flavor.name} {flavor.version} has no {capability.replace('_', ' ')}: leave it out"
            )
    if strip or refit:
        problem = find_gpus().problem
        if problem:
            raise UserError(
                f"{'--strip' if strip else '--refit'} needs an NVIDIA GPU where the engine is built, but {problem}: "
                "build there, or without it"
            )
    return tuple(sorted(chosen))


def _targets(flavor: Flavor, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """The compute capabilities as "8.9", in the flavor's order; "current" becomes this machine's GPU's."""
    if not wanted:
        return ()
    if not flavor.targets:
        raise UserError(f"TensorRT {flavor.name} builds for this machine's GPU alone: leave --compute-capability out")
    names = set(wanted)
    if "current" in names:
        found = find_gpus()
        if found.problem:
            raise UserError(f"--compute-capability current needs an NVIDIA GPU, but {found.problem}: name one, as 8.9")
        names = names - {"current"} | {found.gpus[0].compute_capability}
    if unknown := sorted(names - set(flavor.targets)):
        raise UserError(
            f"TensorRT {flavor.name} {flavor.version} does not build for compute capability {', '.join(unknown)}: take "
            f"{', '.join(flavor.targets)}"
        )
    return tuple(target for target in flavor.targets if target in names)


def _lowered(package: Package, flavor: Flavor, options: _Options) -> tuple["ir.Model", list[str]]:
    """The graph in the form that ``flavor`` takes; UserError where the linter knows that it would be refused or misread."""
    from llmtrt.graph.lowering import Target, lower

    model = _load(package)
    _lint(package, model, lowered=False)  # lowerings are written for graphs that keep to the contract
    model, names = lower(model, Target(flavor.name, flavor.capabilities, options.capacity))
    _lint(package, model, lowered=True)
    return model, names


def _lint(package: Package, model: "ir.Model", lowered: bool) -> None:
    from llmtrt.graph.lint import lint_model

    errors = [finding for finding in lint_model(model, package.path, lowered) if finding.severity == "error"]
    if errors:
        first, more = errors[0], len(errors) - 1
        where = f"{first.node} ({first.operator})" if first.operator else first.node or "the graph"
        see = "" if lowered else f": see `llmtrt lint {package.path}`"
        raise UserError(
            f"{package.graph}: {where} breaks the rule {first.rule}: {first.message}; {first.advice}"
            f"{f' (and {more} more{see})' if more else ''}"
        )


def _load(package: Package) -> "ir.Model":
    """The graph, its weights left on disk; UserError for one that is not ONNX or points outside the package."""
    import onnx_ir as ir

    from llmtrt.graph.lint import external_tensors

    try:
        model = ir.load(package.graph)
    except Exception as error:  # noqa: BLE001 - protobuf and onnx_ir have no common base class for what a bad file makes them raise
        raise UserError(f"{package.graph} is not a readable ONNX model ({' '.join(str(error).split())})") from None
    for tensor_name, tensor in external_tensors(model):
        name = os.fspath(tensor.location)
        files.child(package.path, name)
        if name not in package.manifest["files"]:
            raise UserError(
                f"{package.graph}: tensor {tensor_name!r} lies in {name}, which the manifest does not list: make the "
                "package anew with `llmtrt quantize`"
            )
    return model


def _write_plan(
    flavor: Flavor, package: Package, graph: bytes, options: _Options, plan: Path, report: Report
) -> list[Profile]:
    trt, logger = flavor.module, make_logger(flavor)
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # pybind11's word for a factory that returned nullptr
        raise UserError(
            f"TensorRT {flavor.name} {flavor.version} does not start ({logger.reason() or error}): see `llmtrt doctor`"
        ) from None
    network = builder.create_network(_network_flags(trt))
    parser = parse(flavor, network, graph, package.graph, logger)  # owns the weights
    config = builder.create_builder_config()
    _configure(flavor, config, options)
    inputs = {tensor.name: tuple(tensor.shape) for tensor in map(network.get_input, range(network.num_inputs))}
    profiles = make_profiles(inputs, options.max_batch, options.chunk, options.capacity)
    add_profiles(flavor, builder, config, profiles)
    config.progress_monitor = monitor = make_monitor(flavor, report)
    logger.clear()
    with ThreadPoolExecutor(1) as pool:
        # In a thread of its own, so that Ctrl-C reaches this one while TensorRT is at work.
        job = pool.submit(builder.build_serialized_network, network, config)
        try:
            built = job.result()
        except BaseException:
            monitor.cancel()
            raise
    del parser
    if monitor.error:
        raise monitor.error
    if built is None:
        raise UserError(
            f"TensorRT {flavor.name} {flavor.version} could not build {package.path}: "
            f"{logger.reason() or 'it gave no reason'}"
        )
    with plan.open("wb") as file:
        file.write(built)
    return profiles


def _network_flags(trt: Any) -> int:
    """Strongly typed: since TensorRT 11 every network is, and the flag may be gone."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _configure(flavor: Flavor, config: Any, options: _Options) -> None:
    trt = flavor.module
    config.clear_flag(trt.BuilderFlag.TF32)  # set by default; an fp32 package is to be computed in fp32
    for name in options.flags:
        config.set_flag(getattr(trt.BuilderFlag, name))
    if options.targets:
        config.num_compute_capabilities = len(options.targets)
        for index, target in enumerate(options.targets):
            member = getattr(trt.ComputeCapability, "SM" + target.replace(".", ""))
            if not config.set_compute_capability(member, index):
                raise UserError(f"TensorRT {flavor.name} {flavor.version} refuses compute capability {target}")


def _write_manifest(
    folder: Path,
    output: Path,
    flavor: Flavor,
    package: Package,
    options: _Options,
    profiles: list[Profile],
    lowerings: list[str],
) -> None:
    runtime = {"kernel_specialization": KERNEL_SPECIALIZATION} if flavor.can("kernel_specialization") else {}
    fields = {
        "flavor": {"name": flavor.name, "version": flavor.version},
        "compute_capabilities": list(options.targets),
        "flags": list(options.flags),
        "lowerings": lowerings,
        "runtime": runtime,
        "profiles": [profile.to_json() for profile in profiles],
        "max_batch": options.max_batch,
        "max_seq": options.max_seq,
        "chunk": options.chunk,
        "capacity": options.capacity,
        "model": package.spec.to_json(),
        "generation": package.generation,
        "package": {
            "path": os.path.relpath(package.path.resolve(), output.resolve()),
            "sha256": package.digest,
        },
    }
    write_manifest(folder, ENGINE, fields)
