"""Which runtime a folder runs on here."""

from dataclasses import dataclass
from pathlib import Path

import llmtrt.package as packages
from llmtrt.errors import CannotRunHere, UserError
from llmtrt.runtime.session import Session

RUNTIMES = ("auto", "onnxruntime", "tensorrt")


@dataclass(frozen=True)
class Loaded:
    """A session and what stands beside it: ``folder`` with the tokenizer, ``generation`` (the model's sampling
    defaults), the most sequences and tokens of one that the session takes (None: no limit of its own), and a
    ``notice``, a sentence on why it is not the runtime that the folder was made for."""

    session: Session
    folder: Path
    generation: dict
    max_batch: int | None = None
    max_seq: int | None = None
    notice: str | None = None


def load(path: Path, runtime: str, verify: bool, engine_options: dict, package_options: dict) -> Loaded:
    """Loads the package or engine in ``path`` on ``runtime``, one of ``RUNTIMES``; ``engine_options`` are ``TrtSession``'s
    (``package`` a path), ``package_options`` ``OrtSession``'s.

    ``auto`` takes TensorRT for an engine, and ONNX Runtime for a package or where this machine cannot run an engine but its
    package is found; an engine that is damaged or does not fit the GPU's memory is an error. Raises UserError if that
    cannot be.
    """
    if runtime not in RUNTIMES:
        raise UserError(f"runtime should be one of {', '.join(RUNTIMES)}, but is {runtime!r}")
    from llmtrt.engine.manifest import ENGINE

    if not ENGINE.is_at(path):
        if runtime == "tensorrt":
            raise UserError(f"{path} is not an engine: build one from the package with `llmtrt build {path} -o ENGINE`")
        if engine_options:
            raise UserError(f"{path} is a package, and {', '.join(engine_options)} is for an engine: leave it out")
        return _load_package(path, verify, package_options)
    return _load_engine(path, runtime, verify, engine_options, package_options)


def _load_package(path: Path, verify: bool, options: dict, **limits: object) -> Loaded:
    from llmtrt.runtime.onnxruntime import OrtSession

    package = packages.open_package(path, verify)
    return Loaded(OrtSession(package, **options), package.path, package.generation, **limits)


def _load_engine(path: Path, runtime: str, verify: bool, engine_options: dict, package_options: dict) -> Loaded:
    from llmtrt.engine.manifest import open_engine

    engine = open_engine(path, verify)
    # The engine's limits hold on ONNX Runtime too: what fits on this machine should fit on the one with the GPU.
    limits = {"max_batch": engine.max_batch, "max_seq": engine.max_seq}
    other, generation, package_path = engine_options.pop("package", None), engine.generation, engine.package_path
    if other is not None:
        package_path = Path(other)
        package = engine_options["package"] = packages.open_package(package_path, verify)
        generation = package.generation
    problem = f"runtime={runtime!r} was asked for"
    if runtime != "onnxruntime":
        from llmtrt.runtime.tensorrt import TrtSession

        try:
            return Loaded(TrtSession(engine, verify=verify, **engine_options), engine.path, generation, **limits)
        except CannotRunHere as error:
            if runtime == "tensorrt":
                raise
            problem = str(error)
    if package_path is None:
        raise UserError(
            f"{problem}, and the package that {path} was built from, which ONNX Runtime could run, is not found: give that "
            "package's folder instead"
        )
    notice = f"{problem}; its package {package_path} runs on ONNX Runtime instead"
    return _load_package(
        package_path, verify, package_options, **limits, notice=None if runtime == "onnxruntime" else notice
    )
