"""Puts the weights back into an engine that was built without them (STRIP_PLAN), from the package that it came from."""

from typing import Any

from llmtrt.engine.flavor import Flavor
from llmtrt.engine.manifest import REFIT_GRAPH, Engine
from llmtrt.engine.parse import parse_errors
from llmtrt.errors import UserError
from llmtrt.package import open_package

_NAMED = 3


def refit(flavor: Flavor, deserialized: Any, engine: Engine, logger: Any, verify: bool = True) -> None:
    """Fills ``deserialized``, the ICudaEngine of the stripped plan of ``engine``, before any context of it exists.

    The parser's refitter reads the graph that the plan was built from, which lies beside it without its weights, and the
    weights from the package. ``verify`` compares the package's files with their SHA-256 first.

    Raises UserError if the package is not where the engine's manifest says or is another by now, and if TensorRT is left
    without a weight, naming it.
    """
    if engine.package_path is None:
        raise UserError(
            f"{engine.path} holds no weights, and the package that it was built from is not at "
            f"{engine.manifest['package'].get('path')} (from the engine's folder) or is another by now: put it back there"
        )
    package = open_package(engine.package_path, verify)
    trt = flavor.module
    refitter = trt.Refitter(deserialized, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    logger.clear()
    # Its verdict is not asked: it counts constants that were folded away as not refitted. What is missing is, below.
    parser.refit_from_bytes((engine.path / REFIT_GRAPH).read_bytes(), str(package.graph))
    if missing := refitter.get_missing_weights():
        said = ", ".join(missing[:_NAMED]) + (f" and {len(missing) - _NAMED} more" if missing[_NAMED:] else "")
        reasons = "; ".join(error.reason for error in parse_errors(parser)[:1]) or logger.reason()
        raise UserError(
            f"{engine.path} could not be filled from {package.path}: {said} is missing"
            f"{f' ({reasons})' if reasons else ''}: build the engine anew"
        )
    if not refitter.refit_cuda_engine():
        raise UserError(
            f"{engine.path} could not be filled from {package.path} ({logger.reason() or 'no reason given'})"
        )
