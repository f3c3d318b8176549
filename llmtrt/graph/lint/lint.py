"""Runs every group of rules over one model."""

import logging
from itertools import islice
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from llmtrt.errors import UserError
from llmtrt.graph.lint import attention, cache, contract, model_file, operators, quantization
from llmtrt.graph.lint.finding import Finding, Rule
from llmtrt.graph.lint.subject import Subject, external_tensors, gaps
from llmtrt.package import GRAPH

_GROUPS = (model_file, contract, attention, cache, quantization, operators)
_LARGEST_PROTOBUF = (1 << 31) - 1
_MOST_GAPS = 5  # more of them follow from the first

# What onnx_ir would print of a broken model, tracebacks too, is a finding here; whoever sets up logging still gets it.
logging.getLogger("onnx_ir").addHandler(logging.NullHandler())

RULES: dict[str, Rule] = {rule.id: rule for group in _GROUPS for rule in group.RULES}


def lint(path: str | Path, lowered: bool = False) -> list[Finding]:
    """Findings of the ONNX file ``path``, or of the package in the folder ``path``; errors first.

    External data may be absent; none of it is loaded but small constants and zero points. ``lowered`` says that the
    file is what TensorRT is to parse, where the capacity of the KV cache must be static. Raises UserError where
    ``path`` is no ONNX model.
    """
    path = Path(path)
    path = path / GRAPH if path.is_dir() else path
    return _findings(_from_proto(_load(path), str(path), path.parent), path.parent, lowered)


def lint_model(
    model: onnx.ModelProto | ir.Model, base_dir: str | Path | None = None, lowered: bool = False
) -> list[Finding]:
    """As ``lint`` for a model in memory, which stays as it is; ``base_dir`` is the folder of its external data."""
    base_dir = None if base_dir is None else Path(base_dir)
    if isinstance(model, onnx.ModelProto):
        return _findings(_from_proto(model, "the model", base_dir), base_dir, lowered)
    return _findings(model, base_dir, lowered, is_ours=False)


def _findings(model: ir.Model, base_dir: Path | None, lowered: bool, is_ours: bool = True) -> list[Finding]:
    """``is_ours`` says that ``model`` may be changed."""
    found = list(islice(gaps(model), _MOST_GAPS))
    subject = Subject(model if is_ours or found else model.clone(), base_dir, lowered, found)
    findings: list[Finding] = []
    for group in _GROUPS:
        try:
            for finding in group.check(subject):
                findings.append(finding)  # noqa: PERF402 - keeps what a group found before it fails
        except Exception:  # rules are written for graphs that onnx.checker accepts, and this is none
            if not subject.problems:
                raise
    findings = [finding for finding in findings if not (lowered and RULES[finding.rule].package_only)]
    return sorted(findings, key=lambda finding: finding.severity != "error")


def _load(path: Path) -> onnx.ModelProto:
    try:
        size = path.stat().st_size
        if size > _LARGEST_PROTOBUF:
            raise UserError(
                f"{path} has {size} bytes, more than the 2 GiB that an ONNX file can have: save it with external data"
            )
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}: expected an ONNX file or a package") from None
    except DecodeError:
        raise UserError(f"{path} is not an ONNX model (not a valid protobuf): expected a .onnx file") from None
    if not proto.ir_version or not proto.HasField("graph"):
        raise UserError(f"{path} is not an ONNX model (it has no graph): expected a .onnx file")
    return proto


def _from_proto(proto: onnx.ModelProto, where: str, base_dir: Path | None) -> ir.Model:
    try:
        model = ir.from_proto(proto)
    except Exception as error:  # noqa: BLE001 - a broken graph fails anywhere in onnx_ir
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{where} is not a well-formed ONNX model ({reason}): export it anew") from None
    if base_dir is not None:
        for _, tensor in external_tensors(model):
            tensor.base_dir = base_dir
    return model
