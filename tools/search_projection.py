"""Which form of an INT4 projection is the fastest: each of ``projection_forms`` in a chain of 4096 → 14336 → 4096.

python tools/search_projection.py check [build]  # every form against float64 on ONNX Runtime; no GPU
python tools/search_projection.py time [FORM…]   # on the GPU: microseconds a pair, GB/s of weights, relative error
"""

import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import provenance
from projection_forms import BLOCK, FORMS, HALF, Form

sys.path.insert(0, str(Path(__file__).parents[1]))
from llmtrt.engine.flavor import choose  # noqa: E402
from llmtrt.engine.logger import make_logger  # noqa: E402
from llmtrt.graph.builder import GraphBuilder  # noqa: E402

SHAPES, PAIRS, LAUNCHES = (4096, 14336), 3, 30
_TYPES = {"int8": ir.DataType.INT8, "float16": ir.DataType.FLOAT16}


def weights(rng: np.random.Generator, k: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    q = rng.integers(-8, 8, (k, n), dtype=np.int8)
    scale = (rng.uniform(0.5, 1.5, (k // BLOCK, n)) / (4.6 * k**0.5)).astype(np.float16)
    return q, scale


def chain(form: Form, m: int, shapes: tuple[int, int], pairs: int, seed: int = 0):
    """The graph, the arrays of its inputs beside x, and x · W of the first matrix in float64 for x of ``first_x``."""
    rng, g = np.random.default_rng(seed), GraphBuilder("chain")
    x = g.input("x", HALF, [m, shapes[0]])
    arrays, y = {}, x
    for index in range(2 * pairs):
        k, n = shapes if index % 2 == 0 else shapes[::-1]
        q, scale = weights(rng, k, n)
        packed = form.pack(q, scale)
        values = {}
        for name, array in packed.items():
            where = f"w{index}.{name}"
            if name == "q" and not form.constant:
                values[name] = g.input(where, ir.DataType.INT4, list(array.shape))
                arrays[where] = _int4(array)
            elif name == "q":
                values[name] = g.initializer(
                    ir.PackedTensor(_int4(array), ir.DataType.INT4, shape=ir.Shape(array.shape), name=where)
                )
            elif form.constant:
                values[name] = g.initializer(ir.tensor(array, name=where))
            else:
                values[name] = g.input(where, _TYPES[array.dtype.name], list(array.shape))
                arrays[where] = array
        with g.scope(f"p{index}"):
            y = form.write(g, y, values, m, k, n)
        if index == 0:
            first = y
            matrix = q.astype(np.float64) * np.repeat(scale, BLOCK, 0)
            if "int8" in str(form.pack.__name__):
                matrix = q.astype(np.float64) * scale[:1]
            expected = first_x(m, shapes[0]).astype(np.float64) @ matrix
    if pairs > 0:
        g.output(y, "y", HALF, [m, shapes[0]])
    g.output(first, "first", HALF, [m, shapes[1]])
    return g.model(), arrays, expected


def first_x(m: int, k: int) -> np.ndarray:
    return np.random.default_rng(9).normal(size=(m, k)).astype(np.float16)


def _int4(values: np.ndarray) -> np.ndarray:
    flat = values.reshape(-1).astype(np.uint8) & 15
    return (flat[::2] | flat[1::2] << 4).astype(np.uint8)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def check(builds: bool) -> dict[str, float]:
    """The relative error of each form on ONNX Runtime; ``builds``: and TensorRT makes a plan of it."""
    import onnxruntime

    found = {}
    for name, form in FORMS.items():
        for m in form.rows:
            m, shapes = min(m, 16), (512, 1024)
            model, arrays, expected = chain(form, m, shapes, 1)
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
            if any(value.dtype == ir.DataType.INT4 for value in model.graph.inputs):
                print(name, "cannot be fed to ONNX Runtime", f"{len(build(model)) / 1e6:.1f} MB plan" if builds else "")
                break
            session = onnxruntime.InferenceSession(
                ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            (first,) = session.run(["first"], {"x": first_x(m, shapes[0])} | arrays)
            found[f"{name}, {m} rows"] = error(first, expected)
            built = f"{len(build(model)) / 1e6:.1f} MB plan" if builds else ""
            print(f"{name}, {m} rows: {found[f'{name}, {m} rows']:.1e} {built}", flush=True)
    return found


def build(model: ir.Model) -> bytes:
    flavor = choose()
    trt, logger = flavor.module, make_logger(flavor)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(ir.to_proto(model).SerializeToString()):
        raise RuntimeError("; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    if plan is None:
        raise RuntimeError(logger.reason() or "no reason")
    return bytes(plan)


def time_form(form: Form, m: int) -> dict:
    from llmtrt.runtime.cuda import Cuda

    model, arrays, expected = chain(form, m, SHAPES, PAIRS)
    start = time.monotonic()
    plan = build(model)
    built, flavor, cuda = time.monotonic() - start, choose(), Cuda()
    trt = flavor.module
    try:
        logger = make_logger(flavor)
        engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
        config = engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        context = engine.create_execution_context(config)
        sizes = {"y": 2 * m * SHAPES[0], "first": 2 * m * SHAPES[1]}
        places = {}
        for name, array in ({"x": first_x(m, SHAPES[0])} | arrays).items():
            places[name] = cuda.allocate(array.nbytes)
            cuda.upload(places[name], np.ascontiguousarray(array))
        for name, size in sizes.items():
            places[name] = cuda.allocate(size)
        for name, address in places.items():
            context.set_tensor_address(name, address)
        context.execute_async_v3(cuda.stream)
        cuda.synchronize()
        compiled = time.monotonic() - start - built
        graph = cuda.capture(partial(context.execute_async_v3, cuda.stream))
        best = 1e9
        for _ in range(5):
            cuda.synchronize()
            began = time.perf_counter()
            for _ in range(LAUNCHES):
                cuda.launch(graph)
            cuda.synchronize()
            best = min(best, (time.perf_counter() - began) / LAUNCHES)
        first = np.empty((m, SHAPES[1]), np.float16)
        cuda.download(first, places["first"])
        cuda.synchronize()
        pair = best / PAIRS
        cuda.finish()
        del graph, context, engine, config
        return {
            "us_per_matrix": round(1e6 * pair / 2, 2),
            "gb_per_s": round(sum(SHAPES[0] * SHAPES[1] * (0.5 + 2 / BLOCK) for _ in range(2)) / pair / 1e9, 1),
            "relative_error": float(f"{error(first.astype(np.float64), expected):.1e}"),
            "build_s": round(built, 1),
            "compile_s": round(compiled, 1),
            "plan_mb": round(len(plan) / 1e6, 1),
        }
    finally:
        cuda.close()


def main() -> None:
    if sys.argv[1] == "check":
        assert max(check("build" in sys.argv).values()) < 2e-3
        return
    results = {}
    for name in sys.argv[2:] or FORMS:
        for m in FORMS[name].rows:
            try:
                results[f"{name}, {m} rows"] = time_form(FORMS[name], m)
            except Exception as problem:  # noqa: BLE001 - a form that does not build is a result
                results[f"{name}, {m} rows"] = str(problem)[:300]
            print(f"{name}, {m} rows", results[f"{name}, {m} rows"], flush=True)
            provenance.write("gpu-projections", results, ("numpy",), quiet=True)


if __name__ == "__main__":
    main()
