"""Which form of a decode step's attention is the fastest: eight layers, 32 heads over 8 KV heads of 128, one sequence.

python tools/search_attention.py check [FORM…]   # every form against float64 on ONNX Runtime, and built; no GPU
python tools/search_attention.py time [FORM…]    # on the GPU: relative error, microseconds a layer

With SEQUENCES=16 in the environment, of as many sequences of one length: as many times the heads. KINDS=NONE: of that
kernel specialization alone. TUNED_FOR=1024: with that many rows as the profile's opt shape, and not the capacity.

Tried and dropped (µs a layer on an H100). benchmarks/gpu-attention-first.json: values by Mul + ReduceSum along the rows
(110 to 178 behind 8,192, 68 to 108 by MatMul). gpu-attention-second.json: the cache of values as [1, Hkv · D, capacity, 1],
so that their sums are of what lies side by side (49 behind 8,192, MatMul 56; 21 behind 512 of 33,024, MatMul 16).
"""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import provenance
from onnx_ir.passes.common import ShapeInferencePass
from projection_forms import Hand
from trial_plan import Arrays, Running, build

sys.path.insert(0, str(Path(__file__).parents[1]))
from llmtrt.graph.attention_node import attentions  # noqa: E402
from llmtrt.graph.builder import GraphBuilder  # noqa: E402
from llmtrt.graph.lowerings import split_attention  # noqa: E402

SEQUENCES = int(os.environ.get("SEQUENCES", "1"))
HEADS, KV_HEADS, DIM, LAYERS = 32 * SEQUENCES, 8 * SEQUENCES, 128, 8
GROUP, SCALE = HEADS // KV_HEADS, DIM**-0.5
HALF, FLOAT, INT64 = ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.INT64
# capacity, rows that are seen
CASES = ((1024, 256), (1024, 512), (1024, 1024), (8448, 2048), (8448, 8192), (33024, 512))
CASES = CASES if SEQUENCES == 1 else CASES[:3]
TUNED_FOR = int(os.environ.get("TUNED_FOR", "0"))
KINDS = os.environ.get("KINDS", "NONE,EAGER").split(",")
STEP = 256  # rows that contexts are a multiple of
HIDDEN = float(np.finfo(np.float16).min)
Write = Callable[[GraphBuilder, ir.Value, ir.Value, ir.Value, ir.Value, ir.Value], ir.Value]


def native(g: GraphBuilder, q: ir.Value, k: ir.Value, v: ir.Value, seen: ir.Value, length: ir.Value) -> ir.Value:
    """q [1, H, 1, D], caches [1, Hkv, capacity, D], seen bool [L], length [1] → y [1, H, 1, D]."""
    bounds = (g.constant([0]), length, g.constant([2]))
    mask = g.op("Unsqueeze", seen, g.constant([0, 1, 2]))
    return g.op("Attention", q, g.op("Slice", k, *bounds), g.op("Slice", v, *bounds), mask, scale=SCALE)


def folded(g: GraphBuilder, q: ir.Value, k: ir.Value, v: ir.Value, seen: ir.Value, length: ir.Value) -> ir.Value:
    """MatMul, Softmax, MatMul, the heads of a group as rows."""
    bounds = (g.constant([0]), length, g.constant([1]))
    k, v = (g.op("Slice", g.op("Reshape", x, g.constant([KV_HEADS, -1, DIM])), *bounds) for x in (k, v))
    rows = g.op("Reshape", g.op("Mul", q, g.constant(SCALE, np.float16)), g.constant([KV_HEADS, GROUP, DIM]))
    scores = g.op("MatMul", rows, g.op("Transpose", k, perm=[0, 2, 1]))
    scores = g.op("Where", seen, g.cast(scores, HALF, FLOAT), g.constant(HIDDEN, np.float32))
    weights = g.cast(g.op("Softmax", scores, axis=-1), FLOAT, HALF)
    return g.op("Reshape", g.op("MatMul", weights, v), g.constant([1, HEADS, 1, DIM]))


def split(size: int, sums: str) -> Write:
    """Split-KV (Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html): a softmax for each ``size`` rows,
    put together by their log-sum-exp. ``sums``: which of "qk", "pv" are Mul + ReduceSum instead of MatMul."""

    def write(g: GraphBuilder, q: ir.Value, k: ir.Value, v: ir.Value, seen: ir.Value, length: ir.Value) -> ir.Value:
        splits = g.op("Div", length, g.constant([size]))
        bounds = (g.constant([0]), splits, g.constant([1]))
        k, v = (g.op("Reshape", x, g.constant([KV_HEADS, -1, size, DIM])) for x in (k, v))
        k, v = (g.op("Slice", x, *bounds) for x in (k, v))
        q = g.op("Mul", g.op("Reshape", q, g.constant([KV_HEADS, 1, GROUP, DIM])), g.constant(SCALE, np.float16))
        if "qk" in sums:
            p = g.op("Mul", g.op("Unsqueeze", k, g.constant([2])), g.op("Unsqueeze", q, g.constant([3])))
            scores = g.op("ReduceSum", p, g.constant([4]), keepdims=0)  # [Hkv, splits, G, size]
        else:  # keys as they lie, so that only what is small is transposed
            scores = g.op("MatMul", k, g.op("Transpose", q, perm=[0, 1, 3, 2]))
            scores = g.op("Transpose", scores, perm=[0, 1, 3, 2])
        mask = g.op("Reshape", seen, g.constant([1, -1, 1, size]))
        scores = g.op("Where", mask, g.cast(scores, HALF, FLOAT), g.constant(HIDDEN, np.float32))
        highest = g.op("ReduceMax", scores, g.constant([3]), keepdims=1)
        weights = g.op("Exp", g.op("Sub", scores, highest))
        total = g.op("ReduceSum", weights, g.constant([3]), keepdims=1)  # [Hkv, splits, G, 1]
        weights = g.cast(weights, FLOAT, HALF)
        if "pv" in sums:
            p = g.op("Mul", g.op("Unsqueeze", weights, g.constant([4])), g.op("Unsqueeze", v, g.constant([2])))
            part = g.op("ReduceSum", p, g.constant([3]), keepdims=0)
        else:
            part = g.op("MatMul", weights, v)  # [Hkv, splits, G, D]
        share = g.op("Exp", g.op("Sub", highest, g.op("ReduceMax", highest, g.constant([1]), keepdims=1)))
        above = g.op("ReduceSum", g.op("Mul", g.cast(part, HALF, FLOAT), share), g.constant([1]), keepdims=0)
        below = g.op("ReduceSum", g.op("Mul", total, share), g.constant([1]), keepdims=0)
        return g.op("Reshape", g.cast(g.op("Div", above, below), FLOAT, HALF), g.constant([1, HEADS, 1, DIM]))

    return write


@dataclass(frozen=True)
class Library:
    """As llmtrt.graph.lowerings.split_attention has it: it takes the native form, which stands in the graph first."""

    splits: int

    def __call__(self, *operands: GraphBuilder | ir.Value) -> ir.Value:
        return native(*operands)

    def lower(self, model: ir.Model) -> ir.Model:
        model = ShapeInferencePass()(model).model
        for node in attentions(model):
            split_attention.split(node, STEP, self.splits)
        return model


FORMS: dict[str, Write] = {
    "native": native,
    "folded": folded,
    "splits of 64": split(64, ""),
    "splits of 256": split(256, ""),
    "splits of 128, scores by sums": split(128, "qk"),
    "splits of 256, scores by sums": split(256, "qk"),
    "splits of 64, values by sums": split(64, "pv"),
    **{f"{splits} splits": Library(splits) for splits in (4, 8, 16)},
}


def chain(write: Write, capacity: int, layers: int) -> ir.Model:
    """Each layer's y is the next one's q; ``first`` is the first layer's."""
    g = GraphBuilder("chain")
    y = g.input("q", HALF, [1, HEADS, 1, DIM])
    positions, kv_range = g.input("positions", INT64, [1]), g.input("kv_range", INT64, ["L"])
    seen, length = g.op("LessOrEqual", kv_range, positions), g.op("Shape", kv_range)
    outputs = []
    for index in range(layers):
        k, v = (g.input(f"{which}{index}", HALF, [1, KV_HEADS, capacity, DIM]) for which in "kv")
        with g.scope(f"layer{index}"):
            y = write(g, y, k, v, seen, length)
            outputs.append(y)
            # as in a decoder, whose next product reads it from there
            y = Hand(g).write_out(g.op("Mul", y, g.constant(1.5, np.float16)), (1, HEADS, 1, DIM), HALF)
    g.output(outputs[0], "first", HALF, [1, HEADS, 1, DIM])
    if layers > 1:
        g.output(y, "y", HALF, [1, HEADS, 1, DIM])
    return write.lower(g.model()) if isinstance(write, Library) else g.model()


def given(capacity: int, length: int, layers: int) -> Arrays:
    """The inputs; the last tenth of the rows in sight lies behind the position."""
    rng = np.random.default_rng(0)
    caches = {name: rng.standard_normal((1, KV_HEADS, capacity, DIM), np.float32).astype(np.float16) for name in "kv"}
    found = {"q": 3 * rng.standard_normal((1, HEADS, 1, DIM), np.float32).astype(np.float16)}
    found |= {"positions": np.array([length * 9 // 10]), "kv_range": np.arange(length)}
    return found | {f"{name}{index}": array for index in range(layers) for name, array in caches.items()}


def error(found: np.ndarray, inputs: Arrays) -> float:
    seen = int(inputs["positions"][0]) + 1
    q = inputs["q"].astype(np.float64).reshape(KV_HEADS, GROUP, DIM)
    k, v = (inputs[name][0, :, :seen].astype(np.float64) for name in ("k0", "v0"))
    scores = SCALE * q @ k.transpose(0, 2, 1)
    weights = np.exp(scores - scores.max(2, keepdims=True))
    wanted = (weights / weights.sum(2, keepdims=True) @ v).reshape(-1)
    return float(np.linalg.norm(found.reshape(-1) - wanted) / np.linalg.norm(wanted))


def built(write: Write, capacity: int, layers: int) -> bytes:
    return build(
        chain(write, capacity, layers), {"kv_range": ((256,), (min(TUNED_FOR or capacity, capacity),), (capacity,))}
    )


def check(names: list[str]) -> None:
    import onnxruntime

    inputs = given(1024, 512, 1)
    for name in names or FORMS:
        write = FORMS[name]
        model = ir.to_proto(chain(write, 1024, 1)).SerializeToString()
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        wrong = error(session.run(["first"], inputs)[0], inputs)
        print(f"{name}: {wrong:.1e}, {len(built(write, 1024, 1)) / 1e6:.1f} MB plan", flush=True)
        assert wrong < 2e-3


def prepare(folder: Path, name: str, capacity: int, specialization: str) -> dict:
    """Leaves the plan and its kernels for every length of this capacity in ``folder``."""
    place = folder / f"{list(FORMS).index(name)}-{capacity}-{specialization}"
    plan = built(FORMS[name], capacity, LAYERS)
    place.with_suffix(".plan").write_bytes(plan)
    found = {}
    for rows, length in CASES:
        if rows == capacity:
            inputs = given(capacity, length, LAYERS)
            running = Running(plan, inputs, place.with_suffix(".kernels"), specialization)
            found[length] = float(f"{error(running.output('first'), inputs):.1e}")
            running.save()
            running.close()
    return found


def main() -> None:
    if sys.argv[1] == "check":
        check(sys.argv[2:])
        return
    results = {}
    capacities = sorted({capacity for capacity, _ in CASES})
    cases = [(name, size, kind) for name in sys.argv[2:] or FORMS for size in capacities for kind in KINDS]
    with tempfile.TemporaryDirectory() as folder:
        with ProcessPoolExecutor(max(1, os.cpu_count() - 2), multiprocessing.get_context("spawn")) as pool:
            waiting = [pool.submit(partial(prepare, Path(folder)), *case) for case in cases]
            for (name, capacity, kind), future in zip(cases, waiting):
                where = results.setdefault(name, {})
                try:
                    for length, wrong in future.result().items():
                        where[f"{length} of {capacity}, {kind}"] = {"relative_error": wrong}
                except Exception as problem:  # noqa: BLE001 - a form that does not build is a result
                    where[f"{capacity}, {kind}"] = str(problem)[:300]
        caches = {(capacity, length): given(capacity, length, LAYERS) for capacity, length in CASES}
        for name, capacity, kind in cases:
            place = Path(folder) / f"{list(FORMS).index(name)}-{capacity}-{kind}"
            for rows, length in CASES:
                found = results[name].get(f"{length} of {capacity}, {kind}")
                if rows != capacity or found is None:
                    continue
                running = Running(
                    place.with_suffix(".plan").read_bytes(),
                    caches[capacity, length],
                    place.with_suffix(".kernels"),
                    kind,
                )
                found["us_a_layer"] = round(1e6 * running.seconds() / LAYERS, 2)
                running.close()
        for name, found in results.items():
            print(
                name, {case: tuple(each.values()) if isinstance(each, dict) else each for case, each in found.items()}
            )
    name = "gpu-attention" if SEQUENCES == 1 else f"gpu-attention-{SEQUENCES}"
    provenance.write(name, {"tuned for": TUNED_FOR or "the capacity"} | results, ("numpy",), quiet=True)


if __name__ == "__main__":
    main()
