"""Which runtime a folder runs on here."""

from dataclasses import dataclass
from pathlib import Path

import llmtrt.package as packages
from llmtrt.errors import UserError
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


def load(path: Path, runtime: str, verify: bool, **options: object) -> Loaded:
    """Loads the package or engine in ``path`` on ``runtime``, one of ``RUNTIMES``; ``options`` are ``OrtSession``'s.

    ``auto`` takes TensorRT for an engine, and ONNX Runtime for a package or where an engine cannot run but its package
    is found. Raises UserError if that cannot be.
    """
    if runtime not in RUNTIMES:
        raise UserError(f"runtime should be one of {', '.join(RUNTIMES)}, but is {runtime!r}")
    from llmtrt.engine.manifest import ENGINE

    if not ENGINE.is_at(path):
        if runtime == "tensorrt":
            raise UserError(f"{path} is not an engine: build one from the package with `llmtrt build {path} -o ENGINE`")
        return _load_package(path, verify, options)
    return _load_engine(path, runtime, verify, options)


def _load_package(path: Path, verify: bool, options: dict, **limits: object) -> Loaded:
    from llmtrt.runtime.onnxruntime import OrtSession

    package = packages.open_package(path, verify)
    return Loaded(OrtSession(package, **options), package.path, package.generation, **limits)


def _load_engine(path: Path, runtime: str, verify: bool, options: dict) -> Loaded:
    from llmtrt.engine.manifest import open_engine

    engine = open_engine(path, verify)
    problem = f"runtime={runtime!r} was asked for"
    if runtime != "onnxruntime":
        from llmtrt.runtime.tensorrt import TrtSession

        try:
            return Loaded(
                TrtSession(engine, verify=verify), engine.path, engine.generation, engine.max_batch, engine.max_seq
            )
        except UserError as error:
            if runtime == "tensorrt":
                raise
            problem = str(error)
    if engine.package_path is None:
        raise UserError(
            f"{problem}, and the package that {path} was built from, which ONNX Runtime could run, is not found: give that "
            "package's folder instead"
        )
    notice = f"{problem}; its package {engine.package_path} runs on ONNX Runtime instead"
    # The engine's limits hold here too: what fits on this machine should fit on the one with the GPU.
    limits = {"max_batch": engine.max_batch, "max_seq": engine.max_seq}
    return _load_package(
        engine.package_path, verify, options, **limits, notice=None if runtime == "onnxruntime" else notice
    )
