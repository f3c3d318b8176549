"""How fast a model answers: time to first token, time between tokens, tokens a second, bytes a second."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from llmtrt.engine.manifest import ENGINE, open_engine
from llmtrt.errors import UserError
from llmtrt.package import WEIGHTS, Package, open_package
from llmtrt.progress import Report, silent
from llmtrt.runtime.llm import LLM
from llmtrt.runtime.params import SamplingParams, check_integer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "int4": 0.5}  # of a weight, by its form


@dataclass(frozen=True)
class Case:
    """``batch`` sequences together: a ``prompt`` of so many random tokens, behind ``context`` tokens that are in the cache
    already, as of a chat's turns before; then ``tokens`` new ones."""

    prompt: int = 512
    tokens: int = 128
    batch: int = 1
    context: int = 0

    def __post_init__(self) -> None:
        for name, least in (("prompt", 1), ("tokens", 2), ("batch", 1), ("context", 0)):
            check_integer(f"--{name}", getattr(self, name), least)


@dataclass(frozen=True)
class Speed:
    """Of all runs. ``ttft``: median, of the sequences of a batch too. ``gap_p50``, ``gap_p99``: percentiles of the time from
    one token of a sequence to its next. Seconds. ``tokens_per_second``: of all sequences together, from when each has its
    first; the median run's. ``bytes_per_second``: weights and the cache up to the middle of the answer, read once a step of
    one token each; None where their size is not known, or a step may give several."""

    case: Case
    ttft: float
    gap_p50: float
    gap_p99: float
    tokens_per_second: float
    bytes_per_second: float | None = None

    def to_json(self) -> dict:
        return asdict(self)


def measure(llm: LLM, case: Case, runs: int = 3, weights: int | None = None, report: Report = silent) -> Speed:
    """Runs ``case`` once to warm up and ``runs`` times more, greedily and past every EOS. ``weights``: the bytes of weights
    that a step reads.

    Raises UserError where the model has no room for it, or a batch is not as large as asked for.
    """
    check_integer("--runs", runs, 1)
    if case.batch > llm.max_batch:
        raise UserError(
            f"--batch {case.batch} is more than the {llm.max_batch} sequences that this model runs together"
        )
    needed = case.context + case.prompt + case.tokens
    if needed > llm.max_seq:
        raise UserError(
            f"{needed} tokens (--context, --prompt and --tokens) are more than the model's {llm.max_seq}: ask for fewer"
        )
    rng, firsts, gaps, rates = np.random.default_rng(0), [], [], []
    for run in range(runs + 1):
        report(run, runs + 1, f"batch {case.batch}, context {case.context}")
        times = _times(llm, case, rng)
        if run:
            firsts += [each[0] for each in times]
            gaps += [gap for each in times for gap in np.diff(each)]
            began = max(each[0] for each in times)
            counted = sum(at > began for each in times for at in each)
            rates.append(counted / (max(each[-1] for each in times) - began))
    report(runs + 1, runs + 1)
    rate = float(np.median(rates))
    read = None
    if weights is not None and llm.speculation is None:
        rows = case.context + case.prompt + case.tokens // 2
        read = (weights + case.batch * rows * llm.spec.kv_bytes_per_token()) * rate / case.batch
    return Speed(case, float(np.median(firsts)), *map(float, np.percentile(gaps, (50, 99))), rate, read)


def _times(llm: LLM, case: Case, rng: np.random.Generator) -> list[list[float]]:
    """When each token came, of each sequence, in seconds from the call."""
    whole = rng.integers(0, llm.spec.vocab_size, (case.batch, case.context + case.prompt)).tolist()
    if case.context:
        llm.generate([ids[: case.context] for ids in whole], SamplingParams(max_tokens=1, ignore_eos=True))
    times = [[] for _ in range(case.batch)]
    called = time.perf_counter()
    for piece in llm.generate_stream(whole, SamplingParams(max_tokens=case.tokens, ignore_eos=True)):
        times[piece.index].append(time.perf_counter() - called)
    return times


def weight_bytes(path: Path, batch: int = 1) -> int | None:
    """Bytes of weights that a step of ``batch`` sequences reads of the package or engine in ``path``: all of them, but of an
    embedding that is not the head too only some rows. None for an engine whose package is not found."""
    if ENGINE.is_at(path):
        engine = open_engine(path, verify=False)
        if engine.package_path is None:
            return None
        return engine.step_weight_bytes(batch) - _rows_only(open_package(engine.package_path, verify=False))
    package = open_package(path, verify=False)
    return (package.path / WEIGHTS).stat().st_size - _rows_only(package)


def _rows_only(package: Package) -> int:
    tensors = package.manifest["quantization"]["tensors"]
    if HEAD not in tensors or EMBEDDING not in tensors:
        return 0
    table = tensors[EMBEDDING]
    return int(np.prod(table["shape"]) * _BYTES[table["form"]])


def cases(prompt: int, tokens: int, batches: Sequence[int], contexts: Sequence[int]) -> list[Case]:
    """Every batch size with every context."""
    return [Case(prompt, tokens, batch, context) for context in contexts for batch in batches]
