"""An ONNX graph into a TensorRT network, and parser errors that name the node."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from llmtrt.engine.flavor import Flavor
from llmtrt.engine.logger import sentence
from llmtrt.errors import UserError

_LISTED = 3


@dataclass(frozen=True)
class ParseError:
    """One IParserError. ``index`` is the place in the main graph of the node, or of the call of the outermost function
    around it; ``stack`` lists those functions' calls, outermost first, as TensorRT does."""

    node: str
    index: int
    operator: str
    reason: str
    code: str
    stack: tuple[str, ...]

    def __str__(self) -> str:
        # The index counts in the main graph alone, so it does not tell which node of a function is meant.
        unnamed = "an unnamed node" if self.stack or self.index < 0 else f"node #{self.index}"
        node = f"node {self.node!r}" if self.node else unnamed
        inside = "".join(f" in {call}" for call in reversed(self.stack))
        return f"{node} ({self.operator or 'no operator'}){inside}: {self.reason} [{self.code}]"


def parse(
    flavor: Flavor,
    network: Any,
    model: bytes,
    path: Path,
    logger: Any,
    given: Mapping[str, bytes] = MappingProxyType({}),
) -> tuple[Any, dict[str, np.ndarray]]:
    """Parses ``model`` into ``network``; its external data lie beside ``path``, but for the initializers in ``given``.

    Returns the OnnxParser and the arrays that it reads, which own the weights: hold both until the engine is built. Raises
    one UserError that lists the first nodes that the parser refused.
    """
    parser = flavor.module.OnnxParser(network, logger)
    arrays = {name: np.frombuffer(content, np.uint8) for name, content in given.items()}
    if (
        parser.load_model_proto(model, str(path))
        and all(parser.load_initializer(name, each.ctypes.data, each.nbytes) for name, each in arrays.items())
        and parser.parse_model_proto()
    ):
        return parser, arrays
    errors = parse_errors(parser)
    shown = "; ".join(map(str, errors[:_LISTED])) or logger.reason() or "it gave no reason"
    more = f" (and {len(errors) - _LISTED} more)" if len(errors) > _LISTED else ""
    raise UserError(f"{path}: TensorRT's ONNX parser ({flavor.name} {flavor.version}) refuses {shown}{more}")


def parse_errors(parser: Any) -> list[ParseError]:
    """What an OnnxParser has to say after a failed parse."""
    errors = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        code = getattr(error.code(), "name", str(error.code()))
        stack = tuple(error.local_function_stack()) if error.local_function_stack_size() else ()
        errors.append(
            ParseError(error.node_name(), error.node(), error.node_operator(), _reason(error, code), code, stack)
        )
    return errors


def _reason(error: Any, code: str) -> str:
    """What an IParserError says; where that is the text of a failed check, ``false``, what is known besides."""
    said = sentence(error.desc())
    if said not in ("", "false"):
        return said
    if code == "UNSUPPORTED_NODE":
        return f"TensorRT has no importer for this operator ({error.func()})"
    return f"TensorRT gives no reason but its function {error.func()}"
