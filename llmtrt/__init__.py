"""llmtrt: a Hugging Face LLM as one standard ONNX graph, as a TensorRT engine, as text."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = ["LLM", "SamplingParams", "build", "quantize", "refit"]

if TYPE_CHECKING:
    from llmtrt.engine.build import build
    from llmtrt.engine.refit import refit_engine as refit
    from llmtrt.quantization.pipeline import quantize
    from llmtrt.runtime.llm import LLM
    from llmtrt.runtime.params import SamplingParams

_MODULES = {
    "LLM": "llmtrt.runtime.llm",
    "SamplingParams": "llmtrt.runtime.params",
    "build": "llmtrt.engine.build",
    "quantize": "llmtrt.quantization.pipeline",
    "refit": "llmtrt.engine.refit:refit_engine",
}


def __getattr__(name: str) -> object:
    """Imports a public name when it is first used (PEP 562), so that ``import llmtrt`` is instant."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, _, attribute = _MODULES[name].partition(":")
    return globals().setdefault(name, getattr(import_module(module), attribute or name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
