"""Whether prefill's products are faster where their rows are known: the projections of a layer of the 8B shape.

python tools/search_prefill.py    # on the GPU: microseconds a layer and the products' kernels

Each form of projection_forms is built once for 1 to 2,048 rows and once for the rows that it is run with, by the profile
alone. "fp16" has weights that need no unpacking, for comparison.
"""

import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import provenance
from projection_forms import FORMS, HALF, Arrays, Form, Values
from search_projection import weights
from trial_plan import Running, build

sys.path.insert(0, str(Path(__file__).parents[1]))
from llmtrt.graph.builder import GraphBuilder  # noqa: E402
from llmtrt.quantization.packing import pack_int4  # noqa: E402

SHAPES = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))  # q, k and v; o; gate and up; down
LAYERS, BLOCK = 2, 128
FREE, ROWS = (1, 2048, 2048), (256, 512, 1024, 2048)
_TYPES = {"int8": ir.DataType.INT8, "float16": HALF}


def pack_fp16(q: np.ndarray, scale: np.ndarray) -> Arrays:
    return {"w": np.ascontiguousarray((q * np.repeat(scale, len(q) // len(scale), 0)).T.astype(np.float16))}


def write_fp16(g: GraphBuilder, x: ir.Value, w: Values, m: int, k: int, n: int) -> ir.Value:
    return g.op("Gemm", x, w["w"], transB=1)


CASES = {"native": FORMS["native"], "packed": FORMS["packed"], "fp16": Form(pack_fp16, write_fp16)}


def chain(form: Form, packed: list[Arrays]) -> ir.Model:
    """x [M, 4096] through LAYERS layers, of which each product takes the first columns of the one before."""
    g = GraphBuilder("layers")
    y = g.input("x", HALF, ["M", SHAPES[0][0]])
    for index in range(LAYERS * len(SHAPES)):
        place, values = index % len(SHAPES), {}
        k, n = SHAPES[place]
        for name, array in packed[place].items():
            where, dtype = f"w{index}.{name}", ir.DataType.INT4 if name == "q" else _TYPES[array.dtype.name]
            if not form.constant:
                values[name] = g.input(where, dtype, list(array.shape))
                continue
            array = np.roll(array, index, axis=0)  # equal constants may become one
            if name == "q":
                values[name] = g.initializer(
                    ir.PackedTensor(pack_int4(array), dtype, shape=ir.Shape(array.shape), name=where)
                )
            else:
                values[name] = g.initializer(ir.tensor(array, name=where))
        with g.scope(f"p{index}"):
            y = form.write(g, y, values, -1, k, n)
            following = SHAPES[(place + 1) % len(SHAPES)][0]
            if following < n:
                y = g.op("Slice", y, g.constant([0]), g.constant([following]), g.constant([1]))
            y = g.op("Tanh", y)
    g.output(y, "y", HALF, ["M", SHAPES[0][0]])
    return g.model()


def products(running: Running) -> list[str]:
    """The kernels of a run that multiply matrices, by PyTorch's profiler (CUPTI)."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        running.run()
        running.cuda.synchronize()
    return sorted({event.name for event in watched.events() if re.search("matMul|gemm", event.name)})


def main() -> None:
    import torch

    results: dict = {"machine": torch.cuda.get_device_name()}
    torch.cuda.init()
    with tempfile.TemporaryDirectory() as folder:
        for name, form in CASES.items():
            packed = [form.pack(*weights(k, n, BLOCK)) for k, n in SHAPES]
            model = chain(form, packed)
            free = build(model, {"x": tuple((rows, SHAPES[0][0]) for rows in FREE)})
            for rows in ROWS:
                known = build(model, {"x": ((rows, SHAPES[0][0]),) * 3})
                inputs = {"x": np.random.default_rng(9).normal(size=(rows, SHAPES[0][0])).astype(np.float16)}
                for index in range(0 if form.constant else LAYERS * len(SHAPES)):
                    inputs |= {f"w{index}.{each}": array for each, array in packed[index % len(SHAPES)].items()}
                for kind, plan in (("free", free), ("known", known)):
                    running = Running(plan, inputs, Path(folder) / f"{name}-{rows}-{kind}", "NONE")
                    took = {"us_a_layer": round(1e6 * running.seconds() / LAYERS, 1), "products": products(running)}
                    running.close()
                    results[f"{name}, {rows} rows, {kind}"] = took
                    print(f"{name}, {rows} rows, {kind}", took, flush=True)
    provenance.write("gpu-prefill", results, ("numpy", "torch"), quiet=True)


if __name__ == "__main__":
    main()
