"""Perplexity through the runtime that a user generates with."""

import math
from collections.abc import Sequence

import numpy as np

from llmtrt.errors import UserError
from llmtrt.progress import Report, silent
from llmtrt.runtime.llm import LLM
from llmtrt.runtime.sampling import NOT_NUMBERS


def perplexity(
    llm: LLM, text: str | Sequence[int], context: int = 1024, tokens: int | None = None, report: Report = silent
) -> dict:
    """Perplexity of ``llm`` on ``text`` (a string, or token ids).

    The protocol of the GPTQ paper (Frantar et al. 2022, arXiv:2210.17323) and of Hugging Face's "Perplexity of
    fixed-length models" with a stride of the window: the text is tokenized whole and without BOS, cut to its first
    ``tokens`` tokens and then into windows of ``context`` tokens that do not overlap; each window starts anew and
    predicts all its tokens but the first. A rest shorter than a window is left out.

    Returns ``perplexity`` = exp(``nll``), ``nll`` (mean negative log-likelihood in nats a predicted token), ``tokens``
    (how many the windows have), ``predicted`` (how many of them were predicted), ``context``. Raises UserError if the
    text has not as many tokens as asked for, or fewer than one window.
    """
    if not 2 <= context <= llm.max_seq:
        raise UserError(f"the context should be between 2 and {llm.max_seq} tokens for this model, but is {context}")
    ids = np.asarray(llm.encode(text, special=False) if isinstance(text, str) else text, np.int64)
    wanted = len(ids) if tokens is None else tokens
    if wanted > len(ids):
        raise UserError(
            f"the text has {len(ids)} tokens and {wanted} were asked for: give a longer text or fewer --tokens"
        )
    windows = wanted // context
    if windows < 1:
        raise UserError(
            f"{wanted} tokens are less than one context of {context}: give a longer text or a shorter --context"
        )
    total, predicted = 0.0, 0
    for window in range(windows):
        part = ids[window * context : (window + 1) * context]
        start = 0
        for logits in llm.logits_chunks(part):
            targets = part[start + 1 : start + 1 + len(logits)]
            total += float(_negative_log_likelihood(logits[: len(targets)], targets).sum())
            predicted += len(targets)
            start += len(logits)
        report(window + 1, windows, f"perplexity {math.exp(min(total / predicted, 700)):.2f}")
    nll = total / predicted
    return {
        "perplexity": math.exp(nll) if nll < 700 else math.inf,
        "nll": nll,
        "tokens": windows * context,
        "predicted": predicted,
        "context": context,
    }


def _negative_log_likelihood(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """−log softmax of fp32 ``logits`` [n, V] at ``targets`` [n], summed in float64, row by row to stay small."""
    result = np.empty(len(targets))
    for row, (scores, target) in enumerate(zip(logits, targets)):
        top = scores.max()
        result[row] = np.log(np.exp(scores - top).sum(dtype=np.float64)) + (
            np.float64(top) - np.float64(scores[target])
        )
    if not np.isfinite(result).all():
        raise UserError(NOT_NUMBERS)
    return result
