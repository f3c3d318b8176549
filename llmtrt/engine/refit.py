"""Weights put into an engine that was built, from its own package or from another of the same architecture."""

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrt import files
from llmtrt.checkpoints.tokenizer_files import FILES as TOKENIZER_FILES
from llmtrt.engine.flavor import Flavor, choose
from llmtrt.engine.gpu import find_gpus
from llmtrt.engine.load import deserialize, make_runtime
from llmtrt.engine.logger import make_logger
from llmtrt.engine.manifest import ENGINE, PLAN, REFIT_GRAPH, Engine, open_engine
from llmtrt.engine.parse import parse_errors
from llmtrt.errors import UserError
from llmtrt.manifest import write_manifest
from llmtrt.package import Package, open_package
from llmtrt.progress import Report, silent

if TYPE_CHECKING:
    import onnx_ir as ir

_ANY = "REFIT_INDIVIDUAL"  # the flag of --refit any


def refit(
    flavor: Flavor,
    deserialized: Any,
    engine: Engine,
    logger: Any,
    verify: bool = True,
    package: Package | None = None,
) -> None:
    """Fills ``deserialized``, the ICudaEngine of the plan of ``engine``, before any context of it exists.

    The weights are those of ``package``, by default of the one that the engine was built from; ``verify`` compares that
    one's files with their SHA-256 first, as ``open_package`` did with one that is given.

    Raises UserError if the engine's package is not where its manifest says or is another by now, for a package that
    does not fit (see ``refit_graph``), and if TensorRT is left without a weight, naming it.
    """
    if package is None:
        package = own_package(engine, verify)
    _fill(flavor, deserialized, engine, package, refit_graph(engine, package), logger)


def own_package(engine: Engine, verify: bool) -> Package:
    """The package that ``engine`` was built from; UserError where it is not where the manifest says, or another by now."""
    if engine.package_path is None:
        raise UserError(
            f"{engine.path} holds no weights, and the package that it was built from is not at "
            f"{engine.manifest['package'].get('path')} (from the engine's folder) or is another by now: put it back there, "
            f"or make an engine with weights by `llmtrt refit {engine.path} --package PACKAGE -o NEW_ENGINE`"
        )
    return open_package(engine.package_path, verify)


def refit_engine(
    engine_path: str | Path,
    package_path: str | Path,
    output: str | Path,
    verify: bool = True,
    trust_host_code: bool = False,
    report: Report = silent,
) -> Engine:
    """Writes the engine in ``engine_path`` with the weights of the package in ``package_path`` to the new folder ``output``.

    The new engine holds its weights, and can be refitted again if the old one takes those of any package of its
    architecture. ``verify`` compares the files of both with their SHA-256; ``trust_host_code`` allows the code that a
    version-compatible plan runs on the host.

    Raises UserError, with nothing written, where there is no GPU or not the TensorRT version of the engine, for a
    package that does not fit (see ``refit_graph``), and for a full disk.
    """
    output = Path(output)
    files.require_absent(output)
    if problem := find_gpus().problem:
        raise UserError(f"refitting needs an NVIDIA GPU, but {problem}: run it where there is one")
    engine, package = open_engine(engine_path, verify), open_package(package_path, verify)
    # The very version, even of a version-compatible plan: what another one writes may be a plan of its own version.
    flavor = choose(f"{engine.flavor}=={engine.flavor_version}", need="refit")
    graph, logger = refit_graph(engine, package), make_logger(flavor)
    report(0, 3, "loading the plan")
    runtime = make_runtime(flavor, logger, engine, trust_host_code)
    deserialized = deserialize(flavor, runtime, engine.plan, logger, engine.streams)
    report(1, 3, "refitting")
    _fill(flavor, deserialized, engine, package, graph, logger)
    report(2, 3, "writing")
    with files.staged_folder(output) as folder:
        _write_plan(flavor, deserialized, engine, folder / PLAN, logger)
        if _takes_any(engine):
            (folder / REFIT_GRAPH).write_bytes(graph)
        _copy_others(engine, package, folder)
        _write_manifest(engine, package, folder, output)
    report(3, 3)
    return open_engine(output, verify=False)


def refit_graph(engine: Engine, package: Package) -> bytes:
    """The ONNX model that the parser's refitter reads: the graph that ``engine``'s plan was built from, its weights those
    of ``package``, in external data beside ``package.graph``.

    Raises UserError if the engine takes no weights, or only those of the package it was built from and ``package`` is
    another; and for one whose weights, graph or context are not the engine's, naming every weight that does not fit.
    """
    if not engine.refittable:
        raise UserError(
            f"{engine.path} was built with its weights fixed: build it anew with --refit any, or with --refit identical "
            "for those alone"
        )
    stored = engine.path / REFIT_GRAPH
    if package.digest == engine.manifest["package"].get("sha256"):
        return stored.read_bytes()
    if not _takes_any(engine):
        raise UserError(
            f"{engine.path} takes only the weights of the package that it was built from, and {package.path} is another: "
            "build the engine anew with --refit any"
        )
    structure = engine.manifest["package"].get("structure")
    if structure is None:
        raise UserError(
            f"{engine.path} does not tell the structure of the graph that it was built from: build it anew with "
            f"--refit any to fill it from {package.path}"
        )
    return _retarget(engine, structure, package)


def _takes_any(engine: Engine) -> bool:
    return _ANY in engine.manifest["flags"]


def _retarget(engine: Engine, structure: str, package: Package) -> bytes:
    import onnx_ir as ir

    from llmtrt.graph.structure import load_graph, read_graph, structure_digest, weights

    model, given = read_graph(engine.path / REFIT_GRAPH), load_graph(package)
    wanted, found, same = weights(model), weights(given), structure_digest(given) == structure
    if misfits := list(_misfits(wanted, found)) + ([] if same else list(_extras(wanted, found))):
        raise UserError(
            f"{package.path} does not fit {engine.path}: {'; '.join(misfits)}: build an engine from this package"
        )
    if not same:
        raise UserError(
            f"{package.path} does not fit {engine.path}: its weights would, but its graph has another structure, so it is "
            "another architecture: build an engine from this package"
        )
    if package.spec.max_seq < engine.max_seq:
        raise UserError(
            f"{package.path} is for up to {package.spec.max_seq} tokens and {engine.path} for {engine.max_seq}: make the "
            f"package anew with --max-seq {engine.max_seq}, or the engine with --max-seq {package.spec.max_seq}"
        )
    for name in wanted:
        model.graph.initializers[name].const_value = found[name]
    return ir.to_proto(model).SerializeToString()


def _misfits(wanted: Mapping[str, "ir.TensorProtocol"], found: Mapping[str, "ir.TensorProtocol"]) -> Iterator[str]:
    for name, tensor in wanted.items():
        if name not in found:
            yield f"{name} should be {_kind(tensor)}, but is missing"
        elif _kind(found[name]) != _kind(tensor):
            yield f"{name} should be {_kind(tensor)}, but is {_kind(found[name])}"


def _extras(wanted: Mapping[str, "ir.TensorProtocol"], found: Mapping[str, "ir.TensorProtocol"]) -> Iterator[str]:
    for name, tensor in found.items():
        if name not in wanted:
            yield f"{name}, {_kind(tensor)}, has no place in the engine"


def _kind(tensor: "ir.TensorProtocol") -> str:
    return f"{tensor.dtype.name.lower()} {list(tensor.shape.dims)}"


def _fill(flavor: Flavor, deserialized: Any, engine: Engine, package: Package, graph: bytes, logger: Any) -> None:
    trt = flavor.module
    refitter = trt.Refitter(deserialized, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    logger.clear()
    problems = []
    if not parser.refit_from_bytes(graph, str(package.graph)):
        problems += [error.reason for error in parse_errors(parser)[:1]] or [_reason(logger)]
    if missing := refitter.get_missing_weights():
        problems.append(f"nothing was given for {', '.join(missing)}")
    if not problems and not refitter.refit_cuda_engine():
        problems.append(_reason(logger))
    if problems:
        raise UserError(
            f"{engine.path} could not be filled from {package.path} ({'; '.join(problems)}): build the engine anew"
        )


def _reason(logger: Any) -> str:
    return logger.reason() or "TensorRT gives no reason"


def _write_plan(flavor: Flavor, deserialized: Any, engine: Engine, plan: Path, logger: Any) -> None:
    trt = flavor.module
    config = deserialized.create_serialization_config()
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    if _takes_any(engine):
        config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
    logger.clear()
    content = deserialized.serialize_with_config(config)
    if content is None:
        raise UserError(f"{engine.path} could not be written with its weights ({_reason(logger)}): build it anew")
    with plan.open("wb") as file:
        file.write(content)


def _copy_others(engine: Engine, package: Package, folder: Path) -> None:
    """The files beside plan and graph: the tokenizer is the package's, all of it, where that has one."""
    tokenizer = [name for name in TOKENIZER_FILES if name in package.manifest["files"]]
    for name in engine.manifest["files"]:
        if name not in (PLAN, REFIT_GRAPH) and not (tokenizer and name in TOKENIZER_FILES):
            shutil.copyfile(files.child(engine.path, name), folder / name)
    for name in tokenizer:
        shutil.copyfile(package.path / name, folder / name)


def _write_manifest(engine: Engine, package: Package, folder: Path, output: Path) -> None:
    old = engine.manifest
    fields = {name: value for name, value in old.items() if name != "producer"} | {
        "flags": [flag for flag in old["flags"] if flag not in ("STRIP_PLAN", "REFIT_IDENTICAL")],
        # What the builder said of a stripped plan is not what the weights take.
        "memory": old["memory"] | ({"weights": None} if engine.stripped else {}),
        "model": package.spec.to_json(),
        "generation": package.generation,
        "package": old["package"]
        | {"path": os.path.relpath(package.path.resolve(), output.resolve()), "sha256": package.digest},
    }
    write_manifest(folder, ENGINE, fields)
