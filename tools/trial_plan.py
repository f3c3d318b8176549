"""A small ONNX graph as a TensorRT plan on the GPU, for the searches: built, compiled into a file, run and timed."""

import sys
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).parents[1]))
from llmtrt.engine.flavor import choose  # noqa: E402
from llmtrt.engine.logger import make_logger  # noqa: E402
from llmtrt.engine.parse import parse  # noqa: E402

Arrays = dict[str, np.ndarray]
LAUNCHES, ROUNDS = 30, 5


def build(model: ir.Model, dynamic: dict[str, tuple] | None = None) -> bytes:
    """``dynamic``: (min, opt, max) shapes of the inputs that have a dynamic dimension."""
    flavor = choose()
    trt, logger = flavor.module, make_logger(flavor)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = parse(flavor, network, ir.to_proto(model).SerializeToString(), Path("trial.onnx"), logger)
    config = builder.create_builder_config()
    if dynamic:
        profile = builder.create_optimization_profile()
        for name, shapes in dynamic.items():
            profile.set_shape(name, *shapes)
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    del parser
    if plan is None:
        raise RuntimeError(logger.reason() or "no reason")
    return bytes(plan)


class Running:
    """A plan with its inputs on the GPU, its kernels taken from and left in the file ``kernels``.

    ``inputs`` may hold one array for several names; each gets a copy of its own. ``alike``: the input whose memory another
    input or an output has for its own, by the name of that.
    """

    def __init__(
        self, plan: bytes, inputs: Arrays, kernels: Path, specialization: str = "EAGER", alike: dict | None = None
    ):
        from llmtrt.runtime.cuda import Cuda

        self.cuda, flavor, self._kernels = Cuda(), choose(), kernels
        trt = flavor.module
        engine = self._engine = trt.Runtime(make_logger(flavor)).deserialize_cuda_engine(plan)
        config = self._config = engine.create_runtime_config()
        kinds = trt.DynamicShapesKernelSpecializationStrategy.__members__
        config.dynamic_shapes_kernel_specialization_strategy = kinds[specialization]
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        self._cache = config.create_runtime_cache()
        if kernels.exists():
            self._cache.deserialize(kernels.read_bytes())
        config.set_runtime_cache(self._cache)
        context = self._context = engine.create_execution_context(config)
        self._places, alike = {}, alike or {}
        for name, array in inputs.items():
            if name not in alike:
                self._places[name] = self.cuda.allocate(array.nbytes)
                self.cuda.upload(self._places[name], np.ascontiguousarray(array))
            if -1 in tuple(engine.get_tensor_shape(name)):
                context.set_input_shape(name, array.shape)
        for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
            if name in alike:
                self._places[name] = self._places[alike[name]]
            elif name not in self._places:
                size = int(np.prod(tuple(context.get_tensor_shape(name)))) * engine.get_tensor_dtype(name).itemsize
                self._places[name] = self.cuda.allocate(size)
            context.set_tensor_address(name, self._places[name])
        self.run()
        self.cuda.synchronize()

    def run(self) -> None:
        if not self._context.execute_async_v3(self.cuda.stream):
            raise RuntimeError("TensorRT could not run it")

    def save(self) -> None:
        self._kernels.write_bytes(self._cache.serialize())

    def output(self, name: str, dtype: type = np.float16) -> np.ndarray:
        found = np.empty(tuple(self._context.get_tensor_shape(name)), dtype)
        self.cuda.download(found, self._places[name])
        self.cuda.synchronize()
        return found

    def seconds(self) -> float:
        """Of one run, captured: the least of some rounds' means."""
        graph, best = self.cuda.capture(self.run), 1e9
        for _ in range(ROUNDS):
            self.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(LAUNCHES):
                self.cuda.launch(graph)
            self.cuda.synchronize()
            best = min(best, (time.perf_counter() - began) / LAUNCHES)
        return best

    def close(self) -> None:
        self.cuda.finish()
        self._context = self._config = self._cache = self._engine = None
        self.cuda.close()
