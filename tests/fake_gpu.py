"""A GPU of host memory: CUDA's calls on malloc, and TensorRT's on ONNX Runtime, so that a session's bookkeeping
(shapes, addresses, profiles, memory, order of calls) is tested where there is no GPU. It is strict: what TensorRT would
take silently or crash on, it asserts."""

import ctypes
import types
import weakref

import numpy as np
import onnxruntime as ort

from llmtrt.engine.gpu import Gpu, Gpus

GPU = Gpus((Gpu(0, "Fake GPU", "8.9", 1 << 30),), "580.0", "13.0")
ELEMENTS = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}


class FakeCuda(types.ModuleType):
    """cuda.bindings.runtime over host memory of ``total`` bytes; ``live`` maps address → array.

    What is copied to the host arrives when the stream is waited for. ``ended`` lists what was destroyed, in order.
    """

    cudaStreamNonBlocking = 1

    def __init__(self, total: int = 1 << 30):
        super().__init__("cuda.bindings.runtime")
        self.total, self.live, self.streams = total, {}, set()
        self.ended, self._downloads = [], []
        self._freed = []  # kept, so that no address comes twice and a stale one is always found
        names = (
            "cudaSuccess",
            "cudaErrorMemoryAllocation",
            "cudaErrorInsufficientDriver",
            "cudaErrorNoDevice",
            "cudaErrorInvalidDevice",
            "cudaErrorDevicesUnavailable",
            "cudaErrorInitializationError",
        )
        self.cudaError_t = types.SimpleNamespace(**{name: index for index, name in enumerate(names)})
        self.cudaMemcpyKind = types.SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)

    def used(self) -> int:
        return sum(array.size for array, on_device in self.live.values() if on_device)

    def _allocate(self, size, on_device):
        if on_device and self.used() + size > self.total:
            return 1, None
        # Not zero: whoever needs zeros asks for them.
        array = np.full(size + 256, 0xFF, np.uint8)
        address = -(-array.ctypes.data // 256) * 256
        self.live[address] = (array[: size + address - array.ctypes.data], on_device)
        return 0, address

    def inside(self, address, size):
        """Asserts that the bytes belong to one allocation, and returns them."""
        for start, (array, _) in self.live.items():
            end = array.ctypes.data + array.size
            if start <= address < end or (size == 0 and address == end):
                assert address + size <= end, "beyond the allocation"
                return (ctypes.c_byte * size).from_address(address)
        raise AssertionError(f"{address} was never allocated or is free")

    def cudaSetDevice(self, index):
        return (0,)

    def cudaStreamCreateWithFlags(self, flags):
        self.streams.add(7)
        return 0, 7

    def cudaStreamDestroy(self, stream):
        self.streams.remove(stream)
        self.ended.append("stream")
        return (0,)

    def cudaStreamSynchronize(self, stream):
        assert stream in self.streams
        for to, content in self._downloads:
            ctypes.memmove(to, content, len(content))
        self._downloads.clear()
        return (0,)

    def cudaMemGetInfo(self):
        return 0, self.total - self.used(), self.total

    def cudaMalloc(self, size):
        return self._allocate(size, True)

    def cudaMallocHost(self, size):
        return self._allocate(size, False)

    def cudaFree(self, address):
        return self._free(address, True)

    def cudaFreeHost(self, address):
        return self._free(address, False)

    def _free(self, address, on_device):
        self._freed.append(self.live.pop(address))
        assert self._freed[-1][1] == on_device
        self.ended.append("memory")
        return (0,)

    def cudaMemset2DAsync(self, address, pitch, value, width, height, stream):
        assert stream in self.streams and width <= pitch
        self.inside(address, pitch * (height - 1) + width)
        for row in range(height):
            ctypes.memset(address + row * pitch, value, width)
        return (0,)

    def cudaMemcpyAsync(self, to, source, size, kind, stream):
        assert stream in self.streams
        content = ctypes.string_at(source, size)
        self.inside(to if kind == 1 else source, size)  # the host's side may be any memory
        if kind == 1:
            ctypes.memmove(to, content, size)
        else:
            self._downloads.append((to, content))
        return (0,)

    def cudaGetLastError(self):
        return (0,)

    def cudaGetErrorString(self, status):
        return 0, b"out of memory" if status == 1 else b"another error"


class FakeTensorRT(types.ModuleType):
    """The part of tensorrt_rtx that a session uses; engines run their package's graph on ONNX Runtime.

    Of activation memory an engine wants 1000 bytes for each row of a step, times the rows that are wanted of a slot.
    ``runs`` has for each context the shapes of its steps, ``budgets`` the weight streaming budgets that were set.
    """

    streamable = 0  # bytes of weights in an engine that streams them

    def __init__(self, engine, cuda: FakeCuda, version: str | None = None):
        super().__init__("tensorrt_rtx")
        self.__version__ = version or engine.flavor_version
        self.manifest, self.cuda, self.graph = engine.manifest, cuda, str(engine.package_path / "model.onnx")
        self.plan = engine.plan.read_bytes()
        self.runs, self.budgets = [], []
        outer = self

        class ILogger:
            Severity = types.SimpleNamespace(ERROR=1)

        class Runtime:
            def __init__(self, logger):
                self.logger = logger
                weakref.finalize(self, outer.cuda.ended.append, "runtime")

            def deserialize_cuda_engine(self, plan):
                if bytes(plan) == outer.plan:
                    return FakeEngine(outer)
                self.logger.log(1, "IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error (truncated plan)")
                return None

            def get_engine_validity(self, plan):
                return 2, 2 | 32

        self.ILogger, self.Runtime, self.ICudaEngine = ILogger, Runtime, FakeEngine
        self.ExecutionContextAllocationStrategy = types.SimpleNamespace(USER_MANAGED="user")
        members = {"LAZY": 0, "EAGER": 1, "NONE": 2}
        self.DynamicShapesKernelSpecializationStrategy = types.SimpleNamespace(__members__=members)
        members = {"VERSION_MISMATCH": 1, "UNSUPPORTED_CC": 2, "MALFORMED_ENGINE": 32}
        self.EngineInvalidityDiagnostics = types.SimpleNamespace(__members__=members)


class FakeEngine:
    def __init__(self, trt):
        self.trt, self.streamable_weights_size = trt, trt.streamable
        weakref.finalize(self, trt.cuda.ended.append, "engine")
        options = ort.SessionOptions()
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        options.enable_mem_pattern = False
        self.session = ort.InferenceSession(trt.graph, options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.names = [*self.inputs, *(value.name for value in self.session.get_outputs())]
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, index):
        return self.names[index]

    def get_tensor_shape(self, name):
        shape = self.trt.manifest["profiles"][0]["shapes"][name][1]
        return (-1, *shape[1:])

    def get_tensor_dtype(self, name):
        return types.SimpleNamespace(itemsize=np.dtype(ELEMENTS[self.inputs[name].type]).itemsize)

    def get_aliased_input_tensor(self, name):
        return name.replace("present_", "past_") if name.startswith("present_") else None

    @property
    def weight_streaming_budget_v2(self):
        return self.trt.budgets[-1]

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget):
        assert not self.trt.runs, "the budget cannot change while contexts exist"
        assert 0 <= budget <= self.streamable_weights_size
        self.trt.budgets.append(budget)

    def create_runtime_config(self):
        config = types.SimpleNamespace(strategy="static")
        config.set_execution_context_allocation_strategy = lambda strategy: setattr(config, "strategy", strategy)
        return config

    def create_execution_context(self, config):
        assert config.dynamic_shapes_kernel_specialization_strategy in (0, 1, 2)
        assert config.strategy == "user", "the context would allocate its own memory"
        return FakeContext(self)


class FakeContext:
    def __init__(self, engine):
        self.engine, self.trt, self.cuda = engine, engine.trt, engine.trt.cuda
        self.shapes, self.addresses, self.memory, self.runs = {}, {}, None, []
        self.trt.runs.append(self.runs)
        weakref.finalize(self, self.cuda.ended.append, "context")

    def set_optimization_profile_async(self, profile, stream):
        self.bounds = self.trt.manifest["profiles"][profile]["shapes"]
        return True

    def set_input_shape(self, name, shape):
        low, _, high = self.bounds[name]
        self.memory = None  # until it is asked again how much it needs
        self.shapes[name] = tuple(shape)
        return len(shape) == len(low) and all(a <= b <= c for a, b, c in zip(low, shape, high))

    def set_tensor_address(self, name, address):
        assert name in self.engine.names
        self.addresses[name] = address
        return True

    def update_device_memory_size_for_shapes(self):
        assert self.shapes.keys() == self.engine.inputs.keys()
        self.needed = 1000 * int(np.prod(self.shapes["input_ids"])) * self.shapes["logits_index"][1]
        return self.needed

    def set_device_memory(self, address, size):
        assert size >= self.needed and address % 256 == 0
        self.memory = (address, size)

    def _array(self, name, shape, kind):
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        return np.frombuffer(self.cuda.inside(self.addresses[name], size), kind).reshape(shape)

    def execute_async_v3(self, stream):
        assert stream in self.cuda.streams
        # The shared block is scratch: what is in it before and after means nothing.
        ctypes.memset(ctypes.addressof(self.cuda.inside(*self.memory)), 0xAA, self.memory[1])
        feeds = {
            name: self._array(name, self.shapes[name], ELEMENTS[value.type])
            for name, value in self.engine.inputs.items()
        }
        self.runs.append({name: self.shapes[name] for name in ("input_ids", "logits_index", "kv_range")})
        for name, array in zip(
            (value.name for value in self.engine.session.get_outputs()), self.engine.session.run(None, feeds)
        ):
            self._array(name, array.shape, array.dtype)[...] = array
        return True
