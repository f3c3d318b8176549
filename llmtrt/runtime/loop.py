"""The token loop: prefill in chunks, then one token of every slot a step."""

from collections.abc import Iterator, Sequence
from contextlib import closing

import numpy as np

from llmtrt.runtime.request import Piece, Request
from llmtrt.runtime.session import DeviceSession, Session


def generate(session: Session, requests: Sequence[Request]) -> Iterator[Piece]:
    """Runs ``requests`` together, one a slot, and yields each token as it comes.

    Prompts of different lengths are prefilled side by side from position 0 on; a slot whose prompt ends early gets rows
    of padding from its own length on (``Session`` says why they are harmless) and starts to decode with the others.
    Raises UserError as ``Session.reserve`` and ``Sampler.choose`` do.
    """
    session.reserve(len(requests), max(len(request.prompt) + request.most_tokens for request in requests))
    yield from _prefill(session, requests)
    if all(request.finished for request in requests):
        return
    on_device = isinstance(session, DeviceSession) and not any(request.wants_logits for request in requests)
    yield from (_decode_on_device if on_device else _decode)(session, requests)


def _decode_on_device(session: DeviceSession, requests: Sequence[Request]) -> Iterator[Piece]:
    with closing(session.decode([request.slot() for request in requests])) as steps:
        for tokens in steps:
            for request, token in zip(requests, tokens.tolist()):
                if not request.finished:
                    yield request.take(token)
            if all(request.finished for request in requests):
                return


def _decode(session: Session, requests: Sequence[Request]) -> Iterator[Piece]:
    """Tokens that the host chooses: on runtimes without a sampler, and where log-probabilities are asked for."""
    input_ids = np.zeros((len(requests), 1), np.int64)
    positions = np.array([[len(request.prompt)] for request in requests], np.int64)
    logits_index = np.zeros((len(requests), 1), np.int64)
    active = [(slot, request) for slot, request in enumerate(requests) if not request.finished]
    while active:
        for slot, request in active:
            input_ids[slot] = request.token_ids[-1]
            positions[slot] = request.length - 1
        logits = session.step(input_ids, positions, logits_index)
        for slot, request in active:
            yield request.accept(logits[slot, 0])
            if request.finished:  # idle from now on
                positions[slot] = request.length - 1
        active = [(slot, request) for slot, request in active if not request.finished]


def _prefill(session: Session, requests: Sequence[Request]) -> Iterator[Piece]:
    lengths = np.array([[len(request.prompt)] for request in requests], np.int64)
    longest = int(lengths.max())
    for start in range(0, longest, session.chunk):
        rows = min(session.chunk, longest - start)
        input_ids = np.zeros((len(requests), rows), np.int64)
        for slot, request in enumerate(requests):
            part = request.prompt[start : start + rows]
            input_ids[slot, : len(part)] = part
        positions = np.minimum(lengths, start) + np.arange(rows)
        last = lengths - 1 - start
        logits = session.step(input_ids, positions, np.clip(last, 0, rows - 1))
        for slot, request in enumerate(requests):
            if 0 <= last[slot, 0] < rows:
                yield request.accept(logits[slot, 0])


def logits_of(session: Session, token_ids: np.ndarray, rows: int) -> Iterator[np.ndarray]:
    """Logits, fp32 [≤ rows, V], of each token of one sequence, int64 [S], from its start; ``rows`` is the session's
    chunk at most."""
    rows = min(rows, session.chunk)
    session.reserve(1, len(token_ids))
    for start in range(0, len(token_ids), rows):
        part = token_ids[None, start : start + rows]
        places = np.arange(part.shape[1])[None]
        yield session.step(part, start + places, places)[0]
