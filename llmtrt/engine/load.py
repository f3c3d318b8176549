"""A plan file into an ICudaEngine, or a sentence that says why this machine does not take it."""

import io
import mmap
import os
from pathlib import Path
from typing import Any

from llmtrt.engine.flavor import Flavor
from llmtrt.engine.logger import OUT_OF_MEMORY
from llmtrt.engine.manifest import Engine
from llmtrt.errors import CannotRunHere, UserError

_PIECE = 64 << 20  # bytes
# By the names of trt.EngineInvalidityDiagnostics.
WHY = {
    "VERSION_MISMATCH": "it was built by another TensorRT version",
    "UNSUPPORTED_CC": "it was not built for this GPU's compute capability",
    "OLD_CUDA_DRIVER": "the NVIDIA driver is too old",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old",
    "INSUFFICIENT_GPU_MEMORY": "the GPU has too little memory",
    "MALFORMED_ENGINE": "the plan is damaged",
    "CUDA_ERROR": "CUDA reports an error",
}
_OF_THE_MACHINE = {"VERSION_MISMATCH", "UNSUPPORTED_CC", "OLD_CUDA_DRIVER", "OLD_CUDA_RUNTIME"}


def make_runtime(flavor: Flavor, logger: Any, engine: Engine, trust_host_code: bool = False) -> Any:
    """An IRuntime for ``engine``; ``trust_host_code`` lets it load a version-compatible plan, which carries code that runs
    on the host.

    Raises UserError for such an engine without that, and CannotRunHere if TensorRT does not start, which is how a driver
    that is missing or too old shows.
    """
    if engine.version_compatible and not trust_host_code:
        raise UserError(
            f"{engine.path} is version compatible, so its plan carries code that runs on this machine: pass "
            "--trust-host-code (trust_host_code=True) if you would run a program from whom you have it"
        )
    logger.clear()
    try:
        runtime, reason = flavor.module.Runtime(logger), logger.reason()
    except TypeError as error:  # how most bindings report that there is none
        reason = logger.reason() or str(error)
    if OUT_OF_MEMORY in reason:
        raise UserError(
            f"TensorRT {flavor.name} {flavor.version} does not start ({reason}): close other programs on the GPU"
        )
    if reason:  # lean and dispatch hand out a null pointer that crashes when it is used
        raise CannotRunHere(
            f"TensorRT {flavor.name} {flavor.version} does not start ({reason}): `llmtrt doctor` shows driver and CUDA "
            "versions"
        )
    if engine.version_compatible:
        runtime.engine_host_code_allowed = True
    return runtime


def deserialize(flavor: Flavor, runtime: Any, plan: Path, logger: Any, streams: bool = False) -> Any:
    """The ICudaEngine of the file ``plan``; ``streams``: it was built for weight streaming, so its weights stay in host
    memory, and the file is read in pieces lest they be there twice.

    Raises CannotRunHere for a plan of which TensorRT says that it was made for another version, GPU or driver (as those do
    that can tell: see the flavor's "engine_validity"), UserError for one that is empty or damaged or has no room.
    """
    logger.clear()
    if not plan.stat().st_size:
        engine, said, why = None, [], WHY["MALFORMED_ENGINE"]
    else:
        with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            engine = runtime.deserialize_cuda_engine(_make_reader(flavor, file) if streams else content)
            said, why = _why_not(flavor, runtime, content, logger) if engine is None else ([], "")
    if engine is None:
        remedy = "build the engine anew with `llmtrt build` for this machine"
        if OUT_OF_MEMORY in why:
            remedy = "close other programs on the GPU, or build it with fewer bits or --weight-streaming"
        kind = CannotRunHere if said and _OF_THE_MACHINE.issuperset(said) else UserError
        raise kind(f"TensorRT {flavor.name} {flavor.version} does not load {plan} ({why}): {remedy}")
    return engine


def _make_reader(flavor: Flavor, file: io.BufferedReader) -> Any:
    trt = flavor.module

    class Reader(trt.IStreamReaderV2):
        def __init__(self):
            trt.IStreamReaderV2.__init__(self)

        def read(self, size, stream):
            return file.read(min(size, _PIECE))  # it asks again for what is left

        def seek(self, offset, where):
            file.seek(offset, {"SET": os.SEEK_SET, "CUR": os.SEEK_CUR, "END": os.SEEK_END}[where.name])
            return True

    return Reader()


def _why_not(flavor: Flavor, runtime: Any, content: mmap.mmap, logger: Any) -> tuple[list[str], str]:
    """Why a plan did not load, in TensorRT's names and in words; asked only then, for an engine may run where it is called
    unfit.

    On a GPU that TensorRT-RTX does not list, every plan is called unfit for its compute capability, so that counts only
    where nothing else was said.
    """
    logged, said = logger.reason(), []
    if OUT_OF_MEMORY in logged:
        return [], logged
    if flavor.can("engine_validity"):
        _, bits = runtime.get_engine_validity(content)
        members = flavor.module.EngineInvalidityDiagnostics.__members__
        said = [name for name, member in members.items() if int(bits) & int(member)]
    said = [name for name in said if name != "UNSUPPORTED_CC" or not logged]
    reasons = " and ".join(WHY.get(name, name) for name in said)
    return said, "; ".join(filter(None, (reasons, logged))) or "it gave no reason"
