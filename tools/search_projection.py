"""Which form of an INT4 projection is the fastest: each of ``projection_forms`` in a chain of 4096 → 14336 → 4096.

python tools/search_projection.py check [build]  # every form against float64 on ONNX Runtime; no GPU
python tools/search_projection.py time [FORM…]   # on the GPU: microseconds a matrix, GB/s of weights, relative error

With SHAPE=2048,8192 in the environment, of those sizes.
"""

import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import provenance
from projection_forms import FORMS, HALF, Arrays, Form
from trial_plan import Running, build

sys.path.insert(0, str(Path(__file__).parents[1]))
from llmtrt.graph.builder import GraphBuilder  # noqa: E402
from llmtrt.quantization.packing import pack_int4  # noqa: E402

SHAPES = tuple(map(int, os.environ.get("SHAPE", "4096,14336").split(",")))
PAIRS = -(-160_000_000 // (SHAPES[0] * SHAPES[1]))  # do not fit the L2 cache, so that each is read from memory
_TYPES = {"int8": ir.DataType.INT8, "float16": ir.DataType.FLOAT16}


def weights(k: int, n: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """q [K, N] and scale [K / block, N], the same at every call."""
    rng = np.random.default_rng(k)
    q = (rng.integers(0, 256, (k, n), np.uint8).view(np.int8) >> 4).astype(np.int8)
    return q, (rng.uniform(0.5, 1.5, (k // block, n)) / (4.6 * k**0.5)).astype(np.float16)


def expected(form: Form, m: int, shapes: tuple[int, int]) -> np.ndarray:
    """x · W of the first matrix in float64, for x of ``first_x``, of every 16th column."""
    q, scale = weights(*shapes, form.block)
    q, scale = q[:, ::16].astype(np.float64), scale[:, ::16].astype(np.float64)
    if form.pack.__name__ == "pack_int8":
        scale = scale[:1]
    return first_x(m, shapes[0]).astype(np.float64) @ (q * np.repeat(scale, len(q) // len(scale), 0))


def chain(form: Form, m: int, shapes: tuple[int, int], pairs: int) -> tuple[ir.Model, list[Arrays]]:
    """The graph, and the arrays of a pair of matrices, which all pairs of its inputs take copies of.

    Inputs are x and w<index>.<array>; outputs y, and ``first``, the product with the first matrix.
    """
    g = GraphBuilder("chain")
    y = g.input("x", HALF, [m, shapes[0]])
    packed = [form.pack(*weights(k, n, form.block)) for k, n in (shapes, shapes[::-1])]
    for index in range(2 * pairs):
        k, n = shapes if index % 2 == 0 else shapes[::-1]
        values = {}
        for name, array in packed[index % 2].items():
            where = f"w{index}.{name}"
            dtype = ir.DataType.INT4 if name == "q" else _TYPES[array.dtype.name]
            if not form.constant:
                values[name] = g.input(where, dtype, list(array.shape))
                continue
            array = np.roll(array, index, axis=0) if index > 1 else array  # equal constants may become one
            if name == "q":
                tensor = ir.PackedTensor(pack_int4(array), dtype, shape=ir.Shape(array.shape), name=where)
            else:
                tensor = ir.tensor(array, name=where)
            values[name] = g.initializer(tensor)
        with g.scope(f"p{index}"):
            y = form.write(g, y, values, m, k, n)
        if index == 0:
            first = y
    g.output(y, "y", HALF, [m, shapes[0]])
    g.output(first, "first", HALF, [m, shapes[1]])
    arrays = [{name: pack_int4(each) if name == "q" else each for name, each in pair.items()} for pair in packed]
    return g.model(), [] if form.constant else arrays


def first_x(m: int, k: int) -> np.ndarray:
    return np.random.default_rng(9).normal(size=(m, k)).astype(np.float16)


def error(form: Form, first: np.ndarray, shapes: tuple[int, int]) -> float:
    wanted = expected(form, len(first), shapes)
    return float(np.linalg.norm(first[:, ::16].astype(np.float64) - wanted) / np.linalg.norm(wanted))


def check(builds: bool) -> dict[str, float]:
    """The relative error of each form on ONNX Runtime; ``builds``: and TensorRT makes a plan of it."""
    import onnxruntime

    found, shapes = {}, (512, 1024)
    for name, form in FORMS.items():
        for m in form.rows:
            m = min(m, 16)
            model, arrays = chain(form, m, shapes, 1)
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
            if any(value.dtype == ir.DataType.INT4 for value in model.graph.inputs):
                print(
                    name,
                    "cannot be checked on ONNX Runtime",
                    f"{len(build(model)) / 1e6:.1f} MB plan" if builds else "",
                )
                break
            session = onnxruntime.InferenceSession(
                ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            (first,) = session.run(["first"], given(m, arrays, shapes, 1))
            found[f"{name}, {m} rows"] = error(form, first, shapes)
            built = f"{len(build(model)) / 1e6:.1f} MB plan" if builds else ""
            print(f"{name}, {m} rows: {found[f'{name}, {m} rows']:.1e} {built}", flush=True)
    return found


def given(m: int, arrays: list[Arrays], shapes: tuple[int, int] = SHAPES, pairs: int = PAIRS) -> Arrays:
    """The chain's inputs; all pairs of matrices have the same values."""
    found = {"x": first_x(m, shapes[0])}
    for index in range(2 * pairs if arrays else 0):
        found |= {f"w{index}.{name}": array for name, array in arrays[index % 2].items()}
    return found


def prepare(folder: Path, name: str, m: int) -> dict:
    """Builds and compiles a form, and leaves plan, kernels and arrays in ``folder``."""
    began, form = time.monotonic(), FORMS[name]
    model, arrays = chain(form, m, SHAPES, PAIRS)
    plan = build(model)
    built = time.monotonic()
    place = folder / f"{list(FORMS).index(name)}-{m}"
    running = Running(plan, given(m, arrays), place.with_suffix(".kernels"))
    found = {"build_s": round(built - began, 1), "compile_s": round(time.monotonic() - built, 1)}
    found |= {"relative_error": float(f"{error(form, running.output('first'), SHAPES):.1e}")}
    running.save()
    running.close()
    place.with_suffix(".plan").write_bytes(plan)
    for index, each in enumerate(arrays):
        np.savez(place.with_suffix(f".{index}.npz"), **each)
    return found | {"plan_mb": round(len(plan) / 1e6, 1)}


def time_form(folder: Path, name: str, m: int) -> dict:
    place = folder / f"{list(FORMS).index(name)}-{m}"
    arrays = [dict(np.load(path)) for path in sorted(folder.glob(f"{place.name}.?.npz"))]
    running = Running(place.with_suffix(".plan").read_bytes(), given(m, arrays), place.with_suffix(".kernels"))
    try:
        matrix = running.seconds() / (2 * PAIRS)
    finally:
        running.close()
    size = SHAPES[0] * SHAPES[1] * (0.5 + 2 / FORMS[name].block)
    if arrays:
        size = sum(array.nbytes for each in arrays for array in each.values()) / 2
    return {"us_per_matrix": round(1e6 * matrix, 2), "gb_per_s": round(size / matrix / 1e9, 1)}


def main() -> None:
    if sys.argv[1] == "check":
        assert max(check("build" in sys.argv).values()) < 2e-3
        return
    results, cases = {}, [(name, m) for name in sys.argv[2:] or FORMS for m in FORMS[name].rows]
    with tempfile.TemporaryDirectory() as folder:
        work = partial(prepare, Path(folder))
        with ProcessPoolExecutor(max(1, os.cpu_count() - 2), multiprocessing.get_context("spawn")) as pool:
            waiting = [pool.submit(work, name, m) for name, m in cases]
            for (name, m), future in zip(cases, waiting):
                try:
                    results[f"{name}, {m} rows"] = future.result()
                except Exception as problem:  # noqa: BLE001 - a form that does not build is a result
                    results[f"{name}, {m} rows"] = str(problem)[:300]
        for name, m in cases:
            found = results[f"{name}, {m} rows"]
            if isinstance(found, dict):
                results[f"{name}, {m} rows"] = time_form(Path(folder), name, m) | found
            print(f"{name}, {m} rows", results[f"{name}, {m} rows"], flush=True)
    provenance.write(f"gpu-projections-{SHAPES[0]}", results, ("numpy",), quiet=True)


if __name__ == "__main__":
    main()
