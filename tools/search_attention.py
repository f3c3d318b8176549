"""Which form of a decode step's attention is the fastest: eight layers, 32 heads over 8 KV heads of 128, one sequence.

python tools/search_attention.py check [FORM…]   # every form against float64 on ONNX Runtime, and built; no GPU
python tools/search_attention.py time [FORM…]    # on the GPU: relative error, microseconds a layer

With KINDS=NONE,EAGER in the environment, of those kernel specializations; with TUNED=1024,0, of plans whose profile is tuned
for so many rows (0, the default: for all of the cache's).

Tried and dropped (µs a layer on an H100). benchmarks/gpu-attention-first.json: values by Mul + ReduceSum along the rows
(110 to 178 behind 8,192, 68 to 108 by MatMul). gpu-attention-second.json: the cache of values as [1, Hkv · D, capacity, 1],
so that their sums are of what lies side by side (49 behind 8,192, MatMul 56; 21 behind 512 of 33,024, MatMul 16).
gpu-attention-third.json: all heads of a group as rows of one product (226 behind 8,192), splits of a fixed number of rows
(62 to 69), scores by MatMul; and 4 to 16 splits of a cache of values [1, Hkv, capacity, D], which are copied first.
gpu-attention-tuned.json: 8 splits, in profiles that are tuned for 1,024, 2,048 and all rows (13.1, 13.1 and 13.7 behind 512
of 33,024, but 48, 44 and 38 behind 8,192).
"""

import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import onnx_ir as ir
import provenance
from trial_plan import Arrays, Running, build

sys.path.insert(0, str(Path(__file__).parents[1]))
from llmtrt.graph import attention as att  # noqa: E402
from llmtrt.graph.attention_node import attentions  # noqa: E402
from llmtrt.graph.builder import GraphBuilder  # noqa: E402
from llmtrt.graph.lowering import Lowering, Target, lower  # noqa: E402
from llmtrt.graph.lowerings import one_row_attention, value_rows  # noqa: E402

HEADS, KV_HEADS, DIM, LAYERS = 32, 8, 128, 8
GROUP, SCALE = HEADS // KV_HEADS, DIM**-0.5
HALF, INT64 = ir.DataType.FLOAT16, ir.DataType.INT64
# capacity, rows that are seen
CASES = ((1024, 256), (1024, 512), (1024, 1024), (8448, 2048), (8448, 8192), (33024, 512))
KINDS = os.environ.get("KINDS", "NONE").split(",")
TUNED = [int(rows) for rows in os.environ.get("TUNED", "0").split(",")]
STEP = 256  # rows that contexts are a multiple of
NATIVE = 0  # and not a number of splits
FORMS: dict[str, int] = {"native": NATIVE} | {f"{splits} splits": splits for splits in (4, 8, 16)}


def chain(splits: int, capacity: int, layers: int) -> ir.Model:
    """Each layer's y is the next one's q, of which some heads are the step's keys and values; ``first`` is the first's."""
    g = GraphBuilder("chain")
    y, width = g.input("q", HALF, [1, HEADS, 1, DIM]), HEADS * DIM
    positions, kv_range = g.input("positions", INT64, [1, 1]), g.input("kv_range", INT64, ["L"])
    mask, length = att.attention_mask(g, positions, kv_range, None), g.op("Shape", kv_range)
    write_at, outputs = g.op("Reshape", positions, g.constant([-1])), []
    for index in range(layers):
        presents = []
        for at, which in enumerate(("key", "value")):
            past = g.input(f"past_{which}_{index}", HALF, [1, KV_HEADS, capacity, DIM])
            new = g.op("Slice", y, *map(g.constant, ([at * KV_HEADS], [(at + 1) * KV_HEADS], [1])))
            presents.append(att.update_cache(g, index, which, past, new, write_at))
            g.output(presents[-1], f"present_{which}_{index}", HALF, [1, KV_HEADS, capacity, DIM])
        with g.scope(f"layer{index}"):
            y = att.attend(g, y, *presents, mask, length, SCALE, width)
            outputs.append(y)
            y = g.op("Reshape", g.op("Mul", y, g.constant(1.5, np.float16)), g.constant([1, HEADS, 1, DIM]))
    g.output(outputs[0], "first", HALF, [1, 1, width])
    g.output(y, "y", HALF, [1, HEADS, 1, DIM])
    return lower(g.model(), Target("", frozenset(), capacity, one_row=True), [_form(splits)])[0]


def _form(splits: int) -> Lowering:
    """As llmtrt.graph.lowerings has it, of so many splits."""

    def apply(model: ir.Model, target: Target) -> ir.Model:
        model = value_rows.LOWERING.apply(model, target)
        for node in attentions(model):
            one_row_attention.split(model, node, STEP, splits)
        return model

    return Lowering("splits", lambda model, target: splits != NATIVE, apply)


def given(splits: int, capacity: int, length: int, layers: int, share: float = 0.9) -> Arrays:
    """The inputs; of the rows in sight, the ``share`` up to the position holds something, and the step writes there."""
    rng, at = np.random.default_rng(0), int(share * length)

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(np.float16)

    caches = {which: random(1, KV_HEADS, capacity, DIM) for which in ("key", "value")}
    found = {"q": 3 * random(1, HEADS, 1, DIM), "positions": np.array([[at]]), "kv_range": np.arange(length)}
    if splits != NATIVE:
        by_tokens = np.ascontiguousarray(caches["value"].transpose(0, 2, 1, 3)).reshape(1, 1, capacity, -1)
        seen = by_tokens[0, 0, :length].copy()
        seen[at] = own_rows(found["q"])[1].reshape(-1)
        caches["value"] = by_tokens
        found |= {f"value_rows_{index}": seen.reshape(-1, STEP, KV_HEADS * DIM) for index in range(layers)}
    for index in range(layers):
        found |= {f"past_{which}_{index}": array for which, array in caches.items()}
    return found


def own_rows(q: np.ndarray) -> list[np.ndarray]:
    """The first layer's keys and values [Hkv, 1, D] of the step."""
    return [q[0, at * KV_HEADS : (at + 1) * KV_HEADS] for at in range(2)]


def error(found: np.ndarray, inputs: Arrays) -> float:
    at = int(inputs["positions"][0, 0])
    q = inputs["q"].astype(np.float64).reshape(KV_HEADS, GROUP, DIM)
    k, v = (inputs[f"past_{which}_0"].astype(np.float64)[0] for which in ("key", "value"))
    if len(v) == 1:
        v = v.reshape(-1, KV_HEADS, DIM).transpose(1, 0, 2)
    k, v = (np.concatenate([cache[:, :at], own], 1) for cache, own in zip((k, v), own_rows(inputs["q"])))
    scores = SCALE * q @ k.transpose(0, 2, 1)
    weights = np.exp(scores - scores.max(2, keepdims=True))
    wanted = (weights / weights.sum(2, keepdims=True) @ v).reshape(-1)
    return float(np.linalg.norm(found.reshape(-1) - wanted) / np.linalg.norm(wanted))


def built(splits: int, capacity: int, layers: int, tuned: int = 0) -> bytes:
    tuned = min(tuned or capacity, capacity)
    shapes = {"kv_range": ((STEP,), (tuned,), (capacity,))}
    if splits != NATIVE:
        rows = tuple((size // STEP, STEP, KV_HEADS * DIM) for size in (STEP, tuned, capacity))
        shapes |= {f"value_rows_{index}": rows for index in range(layers)}
    return build(chain(splits, capacity, layers), shapes)


def running(plan: bytes, inputs: Arrays, kernels: Path, specialization: str = "NONE") -> Running:
    """The plan with its caches updated in place, and seen by value_rows_i."""
    alike = {name.replace("past_", "present_"): name for name in inputs if name.startswith("past_")}
    alike |= {name: name.replace("value_rows_", "past_value_") for name in inputs if name.startswith("value_rows_")}
    return Running(plan, inputs, kernels, specialization, alike)


def check(names: list[str]) -> None:
    import onnxruntime

    for name in names or FORMS:
        inputs = given(FORMS[name], 1024, 512, 1)
        model = ir.to_proto(chain(FORMS[name], 1024, 1)).SerializeToString()
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        wrong = error(session.run(["first"], inputs)[0], inputs)
        print(f"{name}: {wrong:.1e}, {len(built(FORMS[name], 1024, 1)) / 1e6:.1f} MB plan", flush=True)
        assert wrong < 2e-3


def prepare(place: Path, name: str, capacity: int, specialization: str, tuned: int) -> dict:
    """Leaves the plan and its kernels for every length of this capacity beside ``place``."""
    plan = built(FORMS[name], capacity, LAYERS, tuned)
    place.with_suffix(".plan").write_bytes(plan)
    found = {}
    for rows, length in CASES:
        if rows == capacity:
            inputs = given(FORMS[name], capacity, length, LAYERS)
            run = running(plan, inputs, place.with_suffix(".kernels"), specialization)
            found[length] = float(f"{error(run.output('first'), inputs):.1e}")
            run.save()
            run.close()
    return found


def _title(name: str, tuned: int) -> str:
    return f"{name}, tuned for {tuned} rows" if tuned else name


def main() -> None:
    if sys.argv[1] == "check":
        check(sys.argv[2:])
        return
    results = {}
    capacities = sorted({capacity for capacity, _ in CASES})
    forms = sys.argv[2:] or FORMS
    cases = [(name, size, kind, tuned) for name in forms for size in capacities for kind in KINDS for tuned in TUNED]
    with tempfile.TemporaryDirectory() as folder:
        with ProcessPoolExecutor(max(1, os.cpu_count() - 2), multiprocessing.get_context("spawn")) as pool:
            places = [Path(folder) / str(index) for index in range(len(cases))]
            waiting = [pool.submit(prepare, place, *case) for place, case in zip(places, cases)]
            for (name, capacity, kind, tuned), future in zip(cases, waiting):
                where = results.setdefault(_title(name, tuned), {})
                try:
                    for length, wrong in future.result().items():
                        where[f"{length} of {capacity}, {kind}"] = {"relative_error": wrong}
                except Exception as problem:  # noqa: BLE001 - a form that does not build is a result
                    where[f"{capacity}, {kind}"] = str(problem)[:300]
        for place, (name, capacity, kind, tuned) in zip(places, cases):
            for rows, length in CASES:
                found = results[_title(name, tuned)].get(f"{length} of {capacity}, {kind}")
                if rows != capacity or found is None:
                    continue
                plan = place.with_suffix(".plan").read_bytes()
                run = running(plan, given(FORMS[name], capacity, length, LAYERS), place.with_suffix(".kernels"), kind)
                found["us_a_layer"] = round(1e6 * run.seconds() / LAYERS, 2)
                run.close()
        for name, found in results.items():
            print(
                name, {case: tuple(each.values()) if isinstance(each, dict) else each for case, each in found.items()}
            )
    provenance.write("gpu-attention", results, ("numpy",), quiet=True)


if __name__ == "__main__":
    main()
