"""The tokens that a model is calibrated on: from a text, from chats, or sampled from the model itself."""

import json
from pathlib import Path

import numpy as np

from llmtrt.errors import UserError
from llmtrt.package import Package
from llmtrt.progress import Report, silent
from llmtrt.runtime.llm import LLM
from llmtrt.runtime.params import SamplingParams
from llmtrt.runtime.tokenizer import Tokenizer

_LARGEST = 1 << 30  # bytes of a file


def read_sequences(path: Path, tokenizer: Tokenizer, sequences: int, length: int) -> np.ndarray:
    """Token ids, int64 [sequences, length], of the start of the file ``path``, cut into pieces that do not overlap.

    A ``.jsonl`` has an object on each line, with ``messages`` (rendered as the model's own chat format has them) or
    ``text``; any other file is a text. Raises UserError for a file that is not as it should be or too short.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise UserError(
                f"--calibration {path} has more than {_LARGEST} bytes: cut it, its start is all that is read"
            )
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--calibration {path} cannot be read as UTF-8 text ({error})") from None
    texts = _from_lines(path, text, tokenizer) if path.suffix == ".jsonl" else [text]
    ids: list[int] = []
    wanted = sequences * length
    for each in texts:
        ids += tokenizer.encode(each, special=False)
        if len(ids) >= wanted:
            return np.array(ids[:wanted], np.int64).reshape(sequences, length)
    raise UserError(
        f"--calibration {path} has {len(ids)} tokens and the recipe asks for {sequences} × {length}: give a longer text, or "
        "a recipe with fewer calibration_sequences"
    )


def _from_lines(path: Path, text: str, tokenizer: Tokenizer):
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict) or not isinstance(entry.get("messages", entry.get("text")), list | str):
            raise UserError(
                f"--calibration {path}, line {number}: expected a JSON object with messages (a list of objects with role "
                "and content) or text"
            )
        if "messages" in entry:
            yield tokenizer.render_chat(entry["messages"], add_generation_prompt=False)
        else:
            yield entry["text"]


def sample_sequences(package: Package, sequences: int, length: int, report: Report = silent) -> np.ndarray:
    """Token ids, int64 [sequences, length], that the model in ``package`` writes by itself at temperature 1, each after a
    first token that is drawn from the vocabulary: the data-free calibration of LLM-QAT (https://arxiv.org/abs/2305.17888).

    The same package gives the same tokens.
    """
    rng, rows = np.random.default_rng(0), []
    with LLM(package.path, runtime="onnxruntime", verify=False) as llm:
        size = llm.max_batch
        for start in range(0, sequences, size):
            report(start, sequences, "sampling text to calibrate on")
            count = min(size, sequences - start)
            firsts = rng.integers(0, package.spec.vocab_size, count).tolist()
            begin = [] if package.spec.bos_token_id is None else [package.spec.bos_token_id]
            prompts = [[*begin, first] for first in firsts]
            left = length - len(prompts[0])
            params = [
                SamplingParams(max_tokens=left, temperature=1.0, top_k=0, top_p=1.0, seed=start + row, ignore_eos=True)
                for row in range(count)
            ]
            done = llm.generate(prompts, params)
            rows += [prompt + completion.token_ids for prompt, completion in zip(prompts, done)]
    report(sequences, sequences)
    return np.array(rows, np.int64)
