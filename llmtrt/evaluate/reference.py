"""What a model is compared with: a package or engine, or the checkpoint itself, unquantized on ONNX Runtime."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmtrt.engine.manifest import ENGINE
from llmtrt.package import PACKAGE
from llmtrt.progress import Report, silent
from llmtrt.quantization.pipeline import quantize
from llmtrt.runtime.llm import LLM


@contextmanager
def opened_reference(path: Path, report: Report = silent) -> Iterator[LLM]:
    """The LLM in ``path``, a package or an engine, or of the checkpoint there: in fp32, as a package that is removed at the
    end and takes four bytes a weight of the folder for temporary files until then."""
    if PACKAGE.is_at(path) or ENGINE.is_at(path):
        with LLM(path, accuracy_level=1) as llm:
            yield llm
        return
    with tempfile.TemporaryDirectory(prefix="llmtrt-") as folder:
        package = quantize(path, Path(folder) / "package", "fp32", report=report).package
        with LLM(package.path, accuracy_level=1, verify=False) as llm:
            yield llm
