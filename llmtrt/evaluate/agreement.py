"""How far a model's predictions are from another's: the same text through both, row by row."""

from collections.abc import Sequence

import numpy as np

from llmtrt.errors import UserError
from llmtrt.progress import Report, silent
from llmtrt.runtime.llm import LLM
from llmtrt.runtime.sampling import NOT_NUMBERS

_SLICE = 128  # rows whose probabilities are held at a time, in float64


def agreement(
    llm: LLM, reference: LLM, token_ids: Sequence[int], context: int = 1024, report: Report = silent
) -> dict[str, float]:
    """Compares ``llm`` with ``reference`` on the windows of ``context`` tokens that ``perplexity`` would take of
    ``token_ids``.

    Returns ``kl_divergence``, the mean over all tokens of KL(reference ‖ llm) in nats, and ``top1_agreement``, the share of
    tokens whose likeliest successor is the same. Raises UserError for models of different vocabularies.
    """
    sizes = llm.spec.vocab_size, reference.spec.vocab_size
    if sizes[0] != sizes[1]:
        raise UserError(
            f"the vocabularies have {sizes[0]} and {sizes[1]} tokens: compare a model with its own checkpoint"
        )
    windows = len(token_ids) // context
    total, same, rows = 0.0, 0, 0
    for window in range(windows):
        part = token_ids[window * context : (window + 1) * context]
        ours = np.concatenate([chunk.copy() for chunk in llm.logits_chunks(part)])
        start = 0
        for theirs in reference.logits_chunks(part):
            mine = ours[start : start + len(theirs)]
            for at in range(0, len(theirs), _SLICE):
                total += float(_divergence(theirs[at : at + _SLICE], mine[at : at + _SLICE]).sum())
            same += int((theirs.argmax(1) == mine.argmax(1)).sum())
            rows, start = rows + len(theirs), start + len(theirs)
        report(window + 1, windows, f"KL divergence {total / rows:.4f}")
    if not np.isfinite(total):
        raise UserError(NOT_NUMBERS)
    return {"kl_divergence": total / rows, "top1_agreement": same / rows}


def _divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(p ‖ q) of each row, of logits [n, V]."""
    log_p, log_q = (_log_softmax(each.astype(np.float64)) for each in (reference, other))
    return (np.exp(log_p) * (log_p - log_q)).sum(1)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
