"""The linter of the graph contract: any ONNX file against what ONNX Runtime and TensorRT do with it silently.

It reads structure alone: it loads no big weights, needs no TensorRT and runs nothing.
"""

from llmtrt.graph.lint.finding import Finding, Rule
from llmtrt.graph.lint.lint import RULES, lint, lint_model
from llmtrt.graph.lint.subject import external_tensors

__all__ = ["RULES", "Finding", "Rule", "external_tensors", "lint", "lint_model"]
