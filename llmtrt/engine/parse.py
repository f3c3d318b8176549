"""An ONNX graph into a TensorRT network, and parser errors that name the node."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrt.engine.flavor import Flavor
from llmtrt.engine.logger import sentence
from llmtrt.errors import UserError

_LISTED = 3


@dataclass(frozen=True)
class ParseError:
    """One IParserError. ``stack`` lists the local functions around the node, outermost last."""

    node: str
    operator: str
    reason: str
    code: str
    stack: tuple[str, ...]

    def __str__(self) -> str:
        inside = f" in {' in '.join(self.stack)}" if self.stack else ""
        return f"node {self.node!r} ({self.operator or 'no operator'}){inside}: {self.reason} [{self.code}]"


def parse(flavor: Flavor, network: Any, model: bytes, path: Path, logger: Any) -> Any:
    """Parses ``model`` into ``network``; its external data lie beside ``path``.

    Returns the OnnxParser, which owns the weights: hold it until the engine is built. Raises one UserError that lists
    the first nodes that the parser refused.
    """
    parser = flavor.module.OnnxParser(network, logger)
    if parser.parse(model, str(path)):
        return parser
    errors = parse_errors(parser)
    shown = "; ".join(map(str, errors[:_LISTED])) or logger.reason() or "it gave no reason"
    more = f" (and {len(errors) - _LISTED} more)" if len(errors) > _LISTED else ""
    raise UserError(f"{path}: TensorRT's ONNX parser ({flavor.name} {flavor.version}) refuses {shown}{more}")


def parse_errors(parser: Any) -> list[ParseError]:
    """What an OnnxParser has to say after a failed parse."""
    errors = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        stack = tuple(error.local_function_stack()) if error.local_function_stack_size() else ()
        errors.append(
            ParseError(
                error.node_name(),
                error.node_operator(),
                sentence(error.desc()),
                getattr(error.code(), "name", str(error.code())),
                stack,
            )
        )
    return errors
