"""What the linter says, and the rules that it says it by."""

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One place that breaks a rule. ``node`` is a node's, or else a tensor's, name; ``operator`` is empty for tensors."""

    rule: str
    severity: Severity
    node: str
    operator: str
    message: str
    advice: str


@dataclass(frozen=True)
class Rule:
    """``reason`` is what a graph must keep to, ``otherwise`` what was measured where it does not; ``package_only`` rules
    are of no concern to a lowered graph, which ONNX Runtime never runs.

    Measured means TensorRT-RTX 1.6.1 and ONNX Runtime 1.32 on the CPU; tests/test_lint_*.py repeat it.
    """

    id: str
    severity: Severity
    reason: str
    otherwise: str
    advice: str
    package_only: bool = False

    def at(self, where: ir.Node | ir.Value | str, message: str = "", severity: Severity | None = None) -> Finding:
        """A finding at ``where``; ``message``, if any, says what was found there, and ``otherwise`` what follows."""
        name = where if isinstance(where, str) else where.name or _first_output(where)
        operator = where.op_type if isinstance(where, ir.Node) else ""
        text = f"{message}: {self.otherwise}" if message else self.otherwise
        return Finding(self.id, severity or self.severity, name, operator, text, self.advice)


def _first_output(where: ir.Node | ir.Value) -> str:
    outputs = where.outputs if isinstance(where, ir.Node) else ()
    return next((f"→ {value.name}" for value in outputs if value.name), "")
