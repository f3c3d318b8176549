"""Where an engine's numbers leave those of its package: one step on both, tensor by tensor.

The tensors are outputs of the engine, put there by ``graph/expose.py`` when it was built with ``debug_tensors``.
TensorRT-RTX 1.6 takes ``INetworkDefinition.mark_debug``, but never calls an IDebugListener for what was marked, only for
tensors of the compiler's own naming; outputs work on every flavor, and on ONNX Runtime alike. An output cannot be fused
away, so the numbers are those of an engine built for debugging. Of more than one token the step is a prefill step: attention
is in the form that those have.
"""

import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol

import numpy as np

from llmtrt.errors import UserError
from llmtrt.package import ModelSpec, Package
from llmtrt.runtime.onnxruntime import OrtSession

# The residual stream after attention and after the MLP of each layer; and what its norms make of it, where one token of
# huge values does not hide the others.
PATTERNS = ("model.layers.*/Add*", "model.layers.*norm/RMSNormalization")
# By the type of the projections. fp32 is multiplied in TF32 by TensorRT-RTX: 6e-4 to 3e-3 were seen on an H200.
BANDS = {"float16": 2e-2, "bfloat16": 2e-2, "float32": 5e-3}
_LAYER = re.compile(r"^model\.layers\.(\d+)[./]|^(?:past|present)_(?:key|value)_(\d+)$")


class DebugSession(Protocol):
    """A ``Session`` with ``debug_values``: name → fp16 or fp32, what its last step computed of each exposed tensor."""

    spec: ModelSpec
    chunk: int

    def reserve(self, slots: int, max_seq: int) -> None: ...

    def step(self, input_ids: np.ndarray, positions: np.ndarray, logits_index: np.ndarray) -> np.ndarray: ...

    def debug_values(self) -> dict[str, np.ndarray]: ...


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from the reference: ``error`` = max |Δ| / ``largest``, the largest |reference| (1 where that is
    0). ``place`` is the index of the worst element, ``value`` and ``reference`` what the two have there.

    ``not_finite`` counts elements that are NaN or infinite where the reference is finite (then ``error`` is infinite),
    ``reference_not_finite`` those of the reference, which are not compared. ``shape`` and ``dtype`` are the reference's;
    ``layer`` is None outside the layers.
    """

    name: str
    layer: int | None
    shape: tuple[int, ...]
    dtype: str
    error: float
    band: float
    largest: float
    place: tuple[int, ...]
    value: float
    reference: float
    not_finite: int
    reference_not_finite: int

    @property
    def outside(self) -> bool:
        return self.error > self.band


@dataclass(frozen=True)
class Comparison:
    """``differences`` in the graph's order, the logits last; ``left_out``: exposed tensors that the two runtimes do not
    both have in one shape, because a lowering replaced them or the KV rows in sight are rounded up otherwise."""

    differences: list[Difference]
    left_out: list[str]

    @property
    def first(self) -> Difference | None:
        """The first tensor outside its band."""
        return next((each for each in self.differences if each.outside), None)

    @property
    def worst(self) -> Difference:
        return max(self.differences, key=lambda each: each.error)


def compare(
    package: Package,
    session: DebugSession,
    token_ids: Sequence[int],
    patterns: Sequence[str] = ("*",),
    band: float | None = None,
    threads: int | None = None,
) -> Comparison:
    """Prefills ``token_ids`` [S] in one step of ``session`` and of ONNX Runtime, which runs the canonical graph of
    ``package`` with INT4 products in fp32, and compares the logits of all rows and what ``session`` exposes under a name
    that one of ``patterns`` (shell wildcards) matches. The KV cache is not compared.

    ``band``: the error allowed, by default that of ``BANDS``; ``threads``: ONNX Runtime's. Raises UserError for no tokens
    or more than ``session.chunk``, for a pattern that matches nothing exposed, and as ``OrtSession`` does.
    """
    ids = np.asarray(token_ids, np.int64)
    check_length(len(ids), session.chunk)
    ours = _run(session, ids)
    graph, names = _exposed(package, _matching(ours.keys() - {"logits"}, patterns))
    with closing(OrtSession(package, threads, 1, len(ids), graph, names)) as reference:
        theirs = _run(reference, ids)
    band = BANDS[package.spec.dtype] if band is None else band
    same = [name for name in theirs if theirs[name].shape == ours[name].shape]
    return Comparison(
        [measure(name, ours[name], theirs[name], band) for name in same],
        sorted(_matching(ours.keys() - {"logits"}, patterns) - {*same}),
    )


def check_length(tokens: int, chunk: int) -> None:
    """UserError unless a step of ``chunk`` rows holds a prompt of ``tokens``."""
    if not tokens:
        raise UserError("the prompt is empty: give at least one token")
    if tokens > chunk:
        raise UserError(
            f"the prompt has {tokens} tokens and one step of the engine takes {chunk}: shorten it, or build the engine with "
            f"--chunk {tokens}"
        )


def measure(name: str, value: np.ndarray, reference: np.ndarray, band: float) -> Difference:
    """The ``Difference`` between two arrays of one shape, fp16 or fp32."""
    finite = np.isfinite(reference)
    lost = finite & ~np.isfinite(value)
    with np.errstate(invalid="ignore", over="ignore"):
        delta = np.abs(np.subtract(value, reference, dtype=np.float32))
    delta[~finite] = 0
    delta[lost] = np.inf
    place = np.unravel_index(delta.argmax(), delta.shape)
    largest = float(np.abs(reference).max(where=finite, initial=0))
    layer = _LAYER.match(name)
    return Difference(
        name,
        layer and int(layer[1] or layer[2]),
        reference.shape,
        reference.dtype.name,
        float(delta[place]) / (largest or 1.0),
        band,
        largest,
        tuple(map(int, place)),
        float(value[place]),
        float(reference[place]),
        int(lost.sum()),
        int((~finite).sum()),
    )


def _run(session: DebugSession, ids: np.ndarray) -> dict[str, np.ndarray]:
    """What one step from an empty cache computes: the exposed tensors, then the logits, fp32 [1, S, V]."""
    session.reserve(1, len(ids))
    rows = np.arange(len(ids))[None]
    logits = session.step(ids[None], rows, rows)
    return session.debug_values() | {"logits": logits}


def _matching(names: set[str], patterns: Sequence[str]) -> set[str]:
    found = {pattern: {name for name in names if fnmatchcase(name, pattern)} for pattern in patterns}
    for pattern, matched in found.items():
        if not matched:
            raise UserError(
                f"--tensors {pattern!r}: none of the engine's {len(names)} debug tensors is named so: give another pattern, "
                f"or build the engine with --debug-tensors {pattern!r}"
            )
    return set().union(*found.values())


def _exposed(package: Package, names: set[str]) -> tuple[bytes, list[str]]:
    """The package's graph, its weights left where they are, with those of ``names`` that it has as outputs; and those."""
    import onnx_ir as ir
    from onnx_ir.passes.common import ShapeInferencePass

    from llmtrt.graph.expose import exposable
    from llmtrt.graph.structure import load_graph

    model = ShapeInferencePass()(load_graph(package)).model
    shown = [value for value in exposable(model) if value.name in names]
    model.graph.outputs.extend(shown)
    return ir.to_proto(model).SerializeToString(), [value.name for value in shown]
