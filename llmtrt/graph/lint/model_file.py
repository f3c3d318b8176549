"""Rules of the file: what onnx.checker says, opset, and where external data lie."""

from collections.abc import Iterator

import onnx_ir as ir

from llmtrt.graph.builder import OPSET
from llmtrt.graph.lint.contract import is_decoder
from llmtrt.graph.lint.finding import Finding, Rule
from llmtrt.graph.lint.subject import STANDARD, Subject, external_tensors

CHECKER = Rule(
    "onnx-checker",
    "error",
    "the model passes onnx.checker with full shape inference",
    "no runtime is bound to accept it",
    "correct the exporter until onnx.checker.check_model(path, full_check=True) passes",
)
OPSET_VERSION = Rule(
    "opset-version",
    "error",
    f"the standard operators are those of opset {OPSET}",
    f"the contract's RMSNormalization, RotaryEmbedding, TensorScatter and Attention are those of opset {OPSET}",
    f"export with opset {OPSET}",
)
DATA_PATH = Rule(
    "external-data-path",
    "error",
    "external data lie inside the model's folder",
    "a reader would open a file that the model's author chose on this machine; onnx and ONNX Runtime refuse to",
    "save the external data beside the model, under a plain file name",
)
DATA_MISSING = Rule(
    "external-data-missing",
    "warning",
    "external data are where the model says",
    "neither runtime loads it, and the linter cannot see the values of zero points and shapes in it",
    "copy the data file beside the model",
)
DATA_SIZE = Rule(
    "external-data-size",
    "error",
    "external data are as long as the tensors in them",
    "the file is truncated or belongs to another model",
    "copy the data file again",
)
RULES = (CHECKER, OPSET_VERSION, DATA_PATH, DATA_MISSING, DATA_SIZE)


def check(subject: Subject) -> Iterator[Finding]:
    for where, problem in subject.problems:
        yield CHECKER.at(where, problem)
    version = next((v for domain, v in subject.model.opset_imports.items() if domain in STANDARD), None)
    if version != OPSET:
        yield OPSET_VERSION.at("", f"opset {version}", None if is_decoder(subject) else "warning")
    yield from _check_external_data(subject)


def _check_external_data(subject: Subject) -> Iterator[Finding]:
    told: set[tuple[str, str]] = set()
    for name, tensor in external_tensors(subject.model):
        if (rule := _broken(subject, tensor)) is not None:
            location = str(tensor.location)
            if (rule.id, location) not in told:
                told.add((rule.id, location))
                yield rule.at(name, f"external data {location!r}")


def _broken(subject: Subject, tensor: ir.ExternalTensor) -> Rule | None:
    path = subject.external_path(tensor)
    if path is None:
        return DATA_PATH
    if subject.base_dir is None:
        return None
    if not path.is_file():
        return DATA_MISSING
    return None if subject.is_readable(tensor) else DATA_SIZE
