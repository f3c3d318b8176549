"""From a package to an engine: the graph lowered for a TensorRT flavor, compiled, and written with its manifest."""

import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrt import files
from llmtrt.checkpoints.tokenizer_files import FILES as TOKENIZER_FILES
from llmtrt.engine.flavor import Flavor, choose
from llmtrt.engine.gpu import find_gpus
from llmtrt.engine.manifest import DECODE, ENGINE, GREEDY, PLAN, REFIT_GRAPH, WEIGHTS, Engine, open_engine, sampler_rows
from llmtrt.engine.options import CONTEXT_STEP, BuildOptions
from llmtrt.engine.plan import PlanMemory, build_plan
from llmtrt.engine.profiles import Profile, decoder_profiles, one_row_profile, sampler_profiles
from llmtrt.errors import UserError
from llmtrt.manifest import write_manifest
from llmtrt.package import Package, open_package
from llmtrt.progress import Report, silent

if TYPE_CHECKING:
    import onnx_ir as ir

_OF_THE_SAMPLER = ("VERSION_COMPATIBLE",)  # it has no weights to strip, refit or stream


@dataclass(frozen=True)
class Built:
    """What ``build`` made and what it took; ``peak_host_bytes`` is the process's peak so far."""

    engine: Engine
    seconds: float
    peak_host_bytes: int


def build(
    package_path: str | Path,
    output: str | Path,
    flavor: str = "auto",
    *,
    max_batch: int = 1,
    max_seq: int | None = None,
    chunk: int = 512,
    opt_batch: int = 1,
    opt_context: int | None = None,
    compute_capabilities: tuple[str, ...] = (),
    weight_streaming: bool = False,
    strip: bool = False,
    refit: str | None = None,
    version_compatible: bool = False,
    kernel_specialization: str = "NONE",
    workspace: int | None = None,
    tactic_shared_memory: int | None = None,
    timing_cache: str | Path | None = None,
    debug_tensors: tuple[str, ...] = (),
    weights: str = "auto",
    verify: bool = True,
    report: Report = silent,
) -> Built:
    """Builds the package in ``package_path`` into an engine in the new folder ``output``.

    The KV cache of each of ``max_batch`` sequences has ``max_seq + chunk`` rows, rounded up to 256; ``max_seq`` is the
    package's context unless it is given, ``chunk`` the most tokens of one prefill step. ``opt_batch`` and ``opt_context``
    are the sizes that kernels are chosen for (1 and 1024). Kernels of their own have: steps of just ``opt_batch`` and just
    ``max_batch`` sequences; prefill of just a chunk, and of one halved down to 512 rows, where weights are not INT4 in the
    plan; and steps of one row that have a plan of their own, for the longest context.
    ``compute_capabilities`` ("8.9", …, or "current") narrows the GPUs that it runs on; without, a flavor that builds ahead
    of time makes one plan for all of 8.0 and later, and any other for the GPU at hand.

    ``strip`` leaves the weights in the package, from where they are refitted when the engine is loaded. ``refit``:
    "identical" (only those weights; the default of ``strip``) or "any" (also those of another package of the same
    architecture). Both need a GPU. ``weight_streaming``: weights may stay in host memory. ``version_compatible``: for
    later minor versions and the lean runtime of the flavor; such a plan carries code that runs on the host.
    ``kernel_specialization`` (LAZY, EAGER, NONE; TensorRT-RTX): how kernels are chosen for shapes when it runs, kept in
    the manifest. ``workspace``, ``tactic_shared_memory``: bytes that a kernel may use of GPU memory and of a
    multiprocessor's shared memory. ``timing_cache``: a file of measured tactics, read if it exists and rewritten.
    ``debug_tensors``: patterns of values that become outputs, for ``llmtrt debug``. ``weights``: "plan"; "inputs": they lie
    in a file of the engine that is copied to the GPU when it is loaded, in a layout for steps of one row, which have a plan
    of their own; "both": those are for that plan alone, and the plan for all else has its own; "auto": "inputs" for one
    sequence on GPUs where that was measured to be faster, "plan" otherwise.

    Raises UserError, with nothing written, for a flavor that is missing, a flavor or a flag that needs a GPU where there
    is none, a graph that TensorRT refuses (naming the nodes), a failed build (with TensorRT's reason) and a full disk.
    """
    start, output = time.monotonic(), Path(output)
    options = BuildOptions(
        max_batch,
        max_seq,
        chunk,
        opt_batch,
        opt_context,
        tuple(compute_capabilities),
        weight_streaming,
        strip,
        refit,
        version_compatible,
        kernel_specialization,
        workspace,
        tactic_shared_memory,
        None if timing_cache is None else Path(timing_cache),
        tuple(debug_tensors),
        weights,
    )
    files.require_absent(output)
    trt = choose(flavor)
    if not trt.can("builds_without_gpu") and (problem := find_gpus().problem):
        raise UserError(
            f"TensorRT {trt.name} {trt.version} builds only where there is an NVIDIA GPU, but {problem}: build on a machine "
            "with one, or ahead of time with --flavor rtx"
        )
    package = open_package(package_path, verify)
    if weights == "auto":
        from llmtrt.engine.weight_place import weight_place

        options = replace(options, weights=weight_place(trt, options, package))
    options = options.resolved(trt, package.spec.max_seq)
    with files.staged_folder(output) as folder:
        made = _build_decoders(trt, package, options, folder, report)
        _build_samplers(trt, package, options, folder)
        for name in TOKENIZER_FILES:
            if name in package.manifest["files"]:
                shutil.copyfile(package.path / name, folder / name)
        _write_manifest(folder, output, trt, package, options, made)
    report(1, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Built(open_engine(output, verify=False), time.monotonic() - start, peak)


@dataclass(frozen=True)
class _Decoders:
    """The plan of all steps, and the one for steps of one row (None: there is none)."""

    profiles: list[Profile]
    memory: PlanMemory
    lowerings: list[str]
    debug_tensors: list[str]
    structure: str
    largest_weight: int  # bytes
    weight_inputs: dict[str, tuple[int, int]]
    one_row: tuple[Profile, PlanMemory, list[str]] | None

    @property
    def weights(self) -> int | None:
        """Bytes in the plans; None where the flavor does not say."""
        said = [self.memory.weights, *([self.one_row[1].weights] if self.one_row else [])]
        return None if None in said else sum(said)


def _build_decoders(flavor: Flavor, package: Package, options: BuildOptions, folder: Path, report: Report) -> _Decoders:
    import onnx_ir as ir

    from llmtrt.engine.weight_file import write_weights
    from llmtrt.graph.expose import expose
    from llmtrt.graph.structure import load_graph, structure_digest, weights

    canonical = load_graph(package)
    _lint(package, canonical, lowered=False)  # lowerings are written for graphs that keep to the contract
    structure = structure_digest(canonical)
    taken, one_row = {}, None
    if options.weights != "plan":
        model, lowerings = _lowered(package, canonical, flavor, options, one_row=True)
        taken = write_weights(model, folder / WEIGHTS, report)
        graph, profile = ir.to_proto(model).SerializeToString(), partial(one_row_profile, options=options)
        (profile,), memory = build_plan(flavor, graph, package.graph, profile, options, folder / DECODE, report)
        one_row = profile, memory, lowerings
    decodes = one_row is None or options.max_batch > 1
    model, lowerings = _lowered(package, canonical, flavor, options, prefill=not decodes)
    shown = expose(model, options.debug_tensors)
    initializers, given = weights(model), _set_apart(model)
    graph = ir.to_proto(model).SerializeToString()  # its weights stay in the package's file
    refits = options.refits
    # An INT4 constant is multiplied by a kernel that reads it as it is, the same for known sizes.
    unpacked = options.weights == "inputs" or all(tensor.dtype != ir.DataType.INT4 for tensor in initializers.values())
    make_profiles = partial(
        decoder_profiles,
        options=options,
        decodes=decodes,
        one_alone=one_row is None and "merged_projections" in lowerings,
        steady_rows=options.steady_rows if unpacked else (),
    )
    profiles, memory = build_plan(
        flavor,
        graph,
        package.graph,
        make_profiles,
        options,
        folder / PLAN,
        report,
        initializers if "REFIT_INDIVIDUAL" in refits else (),
        given,
    )
    if refits:
        (folder / REFIT_GRAPH).write_bytes(graph)
    largest = max((tensor.nbytes for tensor in initializers.values()), default=0)
    return _Decoders(profiles, memory, lowerings, shown, structure, largest, taken, one_row)


def _set_apart(model: "ir.Model") -> dict[str, Callable[[], bytes]]:
    """Leaves of the initializers that a lowering makes their type and shape alone, and returns what makes them: a graph with
    them in it may be more than the 2 GB that protobuf takes."""
    import onnx_ir as ir

    found: dict[str, Callable[[], bytes]] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.LazyTensor):
            value.const_value = ir.ExternalTensor(
                "given", 0, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=name
            )
            found[name] = tensor.tobytes
    return found


def _build_samplers(flavor: Flavor, package: Package, options: BuildOptions, folder: Path) -> None:
    """A plan that takes the likeliest token, and one for all that ``SamplingParams`` can ask for."""
    import onnx_ir as ir

    from llmtrt.graph.sampler import write_sampler

    flags = tuple(flag for flag in options.flags if flag in _OF_THE_SAMPLER)
    options = replace(options, flags=flags, timing_cache=None)
    for name, most in sampler_rows(options.check_rows, options.max_batch).items():
        graph = ir.to_proto(write_sampler(package.spec.vocab_size, name == GREEDY)).SerializeToString()
        where = folder / Path(name).with_suffix(".onnx")  # never there: it has no external data
        profiles = partial(sampler_profiles, options=options, most=most)
        build_plan(flavor, graph, where, profiles, options, folder / name, silent)


def _lowered(
    package: Package,
    model: "ir.Model",
    flavor: Flavor,
    options: BuildOptions,
    one_row: bool = False,
    prefill: bool = False,
) -> tuple["ir.Model", list[str]]:
    """The graph in the form that ``flavor`` takes; UserError where the linter knows that it would be refused or misread."""
    from llmtrt.graph.lowering import Target, lower

    weights = "inputs" if one_row or options.weights == "inputs" else "plan"
    target = Target(
        flavor.name,
        flavor.capabilities,
        options.capacity,
        weights,
        one_row,
        prefill,
        CONTEXT_STEP,
        merges=options.max_batch > 1 and not options.refits,
        value_rows=options.weights != "plan",
    )
    model, names = lower(model, target)
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


def _one_row(made: _Decoders) -> dict | None:
    if made.one_row is None:
        return None
    profile, memory, lowerings = made.one_row
    activations = None if memory.activations is None else list(memory.activations)
    return {"profile": profile.to_json(), "lowerings": lowerings, "activations": activations}


def _write_manifest(
    folder: Path, output: Path, flavor: Flavor, package: Package, options: BuildOptions, made: _Decoders
) -> None:
    specializes = flavor.can("kernel_specialization")
    fields = {
        "flavor": {"name": flavor.name, "version": flavor.version},
        "compute_capabilities": list(options.compute_capabilities),
        "flags": list(options.flags),
        "limits": {"workspace": options.workspace, "tactic_shared_memory": options.tactic_shared_memory},
        "lowerings": made.lowerings,
        "runtime": {"kernel_specialization": options.kernel_specialization} if specializes else {},
        "profiles": [profile.to_json() for profile in made.profiles],
        "one_row": _one_row(made),
        "debug_tensors": made.debug_tensors,
        "weight_inputs": made.weight_inputs,
        "memory": {
            "weights": made.weights,
            "activations": None if made.memory.activations is None else list(made.memory.activations),
            "largest_weight": made.largest_weight,
        },
        "max_batch": options.max_batch,
        "max_seq": options.max_seq,
        "chunk": options.chunk,
        "capacity": options.capacity,
        "check_rows": options.check_rows,
        "model": package.spec.to_json(),
        "generation": package.generation,
        "package": {
            "path": os.path.relpath(package.path.resolve(), output.resolve()),
            "sha256": package.digest,
            "structure": made.structure,
        },
    }
    write_manifest(folder, ENGINE, fields)
