"""A GPU of host memory: CUDA's calls on malloc, and TensorRT's on ONNX Runtime, so that a session's bookkeeping
(shapes, addresses, profiles, memory, graphs, order of calls) is tested where there is no GPU. It is strict: what TensorRT
and CUDA would take silently or crash on, it asserts."""

import ctypes
import functools
import types
import weakref
from collections import Counter
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from llmtrt.engine.gpu import Gpu, Gpus
from llmtrt.engine.manifest import DECODE, GREEDY, PLAN, SAMPLER, WEIGHTS
from llmtrt.graph.names import VALUE_ROWS
from llmtrt.graph.sampler import write_sampler

GPU = Gpus((Gpu(0, "Fake GPU", "8.9", 1 << 30, driver="580.0"),), "580.0", "13.0")
KINDS = {"int64": ("INT64", np.int64), "float": ("FLOAT", np.float32), "float16": ("HALF", np.float16)}
KINDS = {f"tensor({name})": kind for name, kind in (KINDS | {"bool": ("BOOL", np.bool_)}).items()}
RESERVED = 0xAA  # what memory holds that means nothing
UNREAD = "written_out_5"
WINDOW = "MAX_ACCESS_POLICY_WINDOW_SIZE"


@dataclass
class Work:
    """One piece of work on the stream: the device memory that it touches, what it does, and the context that it is of."""

    regions: list[tuple[int, int]]
    run: object
    context: object = None  # a weak reference


@dataclass
class Graph:
    work: list[Work] = field(default_factory=list)


def fake_driver(l2: int) -> types.ModuleType:
    """cuda.bindings.driver, which says how large the cache L2 is."""
    driver = types.ModuleType("cuda.bindings.driver")
    names = {f"CU_DEVICE_ATTRIBUTE_{name}": name for name in ("L2_CACHE_SIZE", WINDOW)}
    driver.CUdevice_attribute = types.SimpleNamespace(**names)
    driver.cuCtxGetDevice = lambda: (0, 0)
    driver.cuDeviceGetAttribute = lambda name, device: (0, 128 << 20 if name == WINDOW else l2)
    return driver


class FakeCuda(types.ModuleType):
    """cuda.bindings.runtime over host memory of ``total`` bytes; ``live`` maps address → array.

    The stream is as late as a stream may be: nothing on it runs before it, or an event behind it, is waited for; pinned
    memory is read and written then. ``ended`` lists what was destroyed, in order; ``calls`` counts the functions used.
    """

    cudaStreamNonBlocking = 1
    cudaEventDisableTiming = 2

    def __init__(self, total: int = 1 << 30):
        super().__init__("cuda.bindings.runtime")
        self.total, self.live, self.streams = total, {}, set()
        self.ended, self.calls = [], Counter()
        self._queue, self._put_so_far, self._done = [], 0, 0
        self._capture = None
        self.graphs: dict[int, Graph] = {}  # captured, not instantiated
        self.executables: dict[int, Graph] = {}
        self._never_launched: set[int] = set()
        self.most_executables = 0
        self.events: dict[int, int | None] = {}
        self._handles = iter(range(1000, 1 << 30))
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
        self.cudaMemcpyKind = types.SimpleNamespace(
            cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
        )
        self.cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeRelaxed=2)

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if name.startswith("cuda") and isinstance(found, types.MethodType):
            self.calls[name] += 1
        return found

    def used(self) -> int:
        return sum(array.size for array, on_device in self.live.values() if on_device)

    def inside(self, address, size):
        """Asserts that the bytes belong to one allocation, and returns them."""
        for start, (array, _) in self.live.items():
            end = array.ctypes.data + array.size
            if start <= address < end or (size == 0 and address == end):
                assert address + size <= end, "beyond the allocation"
                return (ctypes.c_byte * size).from_address(address)
        raise AssertionError(f"{address} was never allocated or is free")

    def is_pinned(self, address) -> bool:
        return any(
            not on_device and start <= address < start + array.size for start, (array, on_device) in self.live.items()
        )

    def put(self, work: Work) -> None:
        """On the stream, or into the graph that is being captured."""
        for region in work.regions:
            self.inside(*region)
        if self._capture is not None:
            self._capture.work.append(work)
            return
        self._queue.append(work)
        self._put_so_far += 1

    @property
    def capturing(self) -> bool:
        return self._capture is not None

    def _run(self, until: int) -> None:
        assert not self.capturing, "nobody may wait for a stream that is being captured"
        while self._done < until:
            work = self._queue.pop(0)
            self._done += 1
            for region in work.regions:
                self.inside(*region)
            work.run()

    def take(self, size, on_device=True):
        """An allocation's address; None where there is no room."""
        assert not self.capturing, "the session takes no memory while it captures"
        if on_device and self.used() + size > self.total:
            return None
        # Not zero: whoever needs zeros asks for them.
        array = np.full(size + 256, 0xFF, np.uint8)
        address = -(-array.ctypes.data // 256) * 256
        self.live[address] = (array[address - array.ctypes.data :][:size], on_device)
        return address

    def give(self, address, on_device=True):
        self._freed.append(self.live.pop(address))
        assert self._freed[-1][1] == on_device

    def _allocate(self, size, on_device):
        address = self.take(size, on_device)
        return (1, None) if address is None else (0, address)

    def _free(self, address, on_device):
        assert not self._queue, "memory is freed that work on the stream may use"
        assert not self.capturing
        self.give(address, on_device)
        self.ended.append("memory")
        return (0,)

    def cudaSetDevice(self, index):
        return (0,)

    def cudaStreamCreateWithFlags(self, flags):
        handle = next(self._handles)
        self.streams.add(handle)
        return 0, handle

    def cudaStreamDestroy(self, stream):
        self.streams.remove(stream)
        assert not self._queue
        self.ended.append("stream")
        return (0,)

    def cudaStreamSynchronize(self, stream):
        assert stream in self.streams
        self._run(self._put_so_far)
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

    def cudaMemset2DAsync(self, address, pitch, value, width, height, stream):
        assert stream in self.streams and width <= pitch

        def run():
            for row in range(height):
                ctypes.memset(address + row * pitch, value, width)

        self.put(Work([(address, pitch * (height - 1) + width)], run))
        return (0,)

    def cudaMemcpyAsync(self, to, source, size, kind, stream):
        assert stream in self.streams
        on_device = {1: [(to, size)], 2: [(source, size)], 3: [(to, size), (source, size)]}[kind]
        if kind == 3:
            assert to + size <= source or source + size <= to, "a copy onto itself is not defined"
        if kind == 1 and not self.is_pinned(source):
            assert not self.capturing, "a graph would read host memory that is gone by then"
            content = ctypes.string_at(source, size)  # read by the time of the return
            self.put(Work(on_device, lambda: ctypes.memmove(to, content, size)))
        else:
            self.put(Work(on_device, lambda: ctypes.memmove(to, source, size)))
        return (0,)

    def cudaMemcpy2DAsync(self, to, to_pitch, source, pitch, width, height, kind, stream):
        assert stream in self.streams and kind == 3 and to_pitch == pitch >= width > 0
        size = pitch * (height - 1) + width
        assert to + size <= source or source + size <= to

        def run():
            for row in range(height):
                ctypes.memmove(to + row * pitch, source + row * pitch, width)

        self.put(Work([(to, size), (source, size)], run))
        return (0,)

    def cudaStreamBeginCapture(self, stream, mode):
        assert stream in self.streams and mode == 2 and not self.capturing
        self._capture = Graph()
        return (0,)

    def cudaStreamEndCapture(self, stream):
        assert self.capturing
        handle, self._capture, captured = next(self._handles), None, self._capture
        self.graphs[handle] = captured
        return 0, handle

    def cudaGraphInstantiate(self, graph, flags):
        handle = next(self._handles)
        self.executables[handle] = self.graphs[graph]
        self._never_launched.add(handle)
        self.most_executables = max(self.most_executables, len(self.executables))
        return 0, handle

    def cudaGraphDestroy(self, graph):
        del self.graphs[graph]
        return (0,)

    def cudaGraphLaunch(self, executable, stream):
        """What the graph does is as it was captured: addresses, shapes, sizes."""
        assert stream in self.streams and not self.capturing
        assert executable in self.executables, "the graph was destroyed"
        assert self._never_launched <= {executable}, "a graph that was never launched slows all others"
        self._never_launched.clear()
        for work in self.executables[executable].work:
            assert work.context is None or work.context() is not None, "the graph's context is gone"
            self.put(work)
        return (0,)

    def cudaGraphExecDestroy(self, executable):
        assert not self._queue, "a graph is destroyed that may be running"
        del self.executables[executable]
        self._never_launched.discard(executable)
        self.ended.append("graph")
        return (0,)

    def cudaEventCreateWithFlags(self, flags):
        assert flags == self.cudaEventDisableTiming
        handle = next(self._handles)
        self.events[handle] = None
        return 0, handle

    def cudaEventRecord(self, event, stream):
        assert event in self.events and stream in self.streams and not self.capturing
        self.events[event] = self._put_so_far
        return (0,)

    def cudaEventSynchronize(self, event):
        assert self.events[event] is not None, "the event was never recorded"
        self._run(self.events[event])
        return (0,)

    def cudaEventDestroy(self, event):
        del self.events[event]
        self.ended.append("event")
        return (0,)

    def cudaGetLastError(self):
        return (0,)

    def cudaGetErrorString(self, status):
        return 0, b"out of memory" if status == 1 else b"another error"


class Severity(IntEnum):
    ERROR = 1


class FakeRuntimeCache:
    """Kernels by name; what it is written as begins with a word of its own."""

    _MAGIC = b"kernels of the fake:"

    def __init__(self):
        self.kernels = set()

    def deserialize(self, content):
        if not content.startswith(self._MAGIC):
            return False
        self.kernels = set(content[len(self._MAGIC) :].decode().split())
        return True

    def serialize(self):
        return memoryview(self._MAGIC + " ".join(sorted(self.kernels)).encode())


class FakeTensorRT(types.ModuleType):
    """The part of tensorrt_rtx that a session uses. The plan of a decoder runs ``graph``, by default that of the engine's
    package, the sampler's plans the sampler's graphs, all on ONNX Runtime.

    Of activation memory a decoder wants 1000 bytes for each row of a step, times the rows that are wanted of a slot; a
    sampler 500 for each slot. ``weights`` is what the decoder's take. ``runs`` has the plan, the profile and the shapes of
    each step, ``budgets`` the weight streaming budgets that were set, ``compiled`` the kernels that no cache had.
    """

    def __init__(self, engine, cuda: FakeCuda, version: str | None = None, graph=None, weights: int = 0):
        super().__init__("tensorrt_rtx")
        self.__version__ = version or engine.flavor_version
        self.manifest, self.cuda, self.weights = engine.manifest, cuda, weights
        self.graph = str(graph or engine.package_path / "model.onnx")
        self.plans = {(engine.path / name).read_bytes(): name for name in engine.plans}
        self.runs, self.budgets, self.compiled, self.strategies = [], [], [], []
        self.read_as_stream = []
        self.contexts = weakref.WeakSet()
        stored = (engine.path / WEIGHTS).read_bytes() if engine.weight_inputs else b""
        self.weight_inputs = {
            name: stored[start : start + size] for name, (start, size) in engine.weight_inputs.items()
        }
        self.trusts_host_code = False
        outer = self

        class ILogger:
            Severity = Severity

        class IStreamReaderV2:
            pass

        class Runtime:
            def __init__(self, logger):
                self.logger = logger
                weakref.finalize(self, outer.cuda.ended.append, "runtime")

            def deserialize_cuda_engine(self, plan):
                streams = isinstance(plan, IStreamReaderV2)
                content = _read(plan) if streams else bytes(plan)
                if content in outer.plans:
                    name = outer.plans[content]
                    if streams:
                        outer.read_as_stream.append(name)
                    return FakeEngine(outer, name)
                self.logger.log(1, "IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error (truncated plan)")
                return None

            def get_engine_validity(self, plan):
                return 2, 2 | 32

        self.ILogger, self.Runtime, self.ICudaEngine = ILogger, Runtime, FakeEngine
        self.IStreamReaderV2, self.IRuntimeCache = IStreamReaderV2, FakeRuntimeCache
        self.ExecutionContextAllocationStrategy = types.SimpleNamespace(
            USER_MANAGED="user", ON_PROFILE_CHANGE="profile", STATIC="static"
        )
        self.CudaGraphStrategy = types.SimpleNamespace(DISABLED="disabled")
        members = {"LAZY": 0, "EAGER": 1, "NONE": 2}
        self.DynamicShapesKernelSpecializationStrategy = types.SimpleNamespace(__members__=members)
        members = {"VERSION_MISMATCH": 1, "UNSUPPORTED_CC": 2, "MALFORMED_ENGINE": 32}
        self.EngineInvalidityDiagnostics = types.SimpleNamespace(__members__=members)

    def runs_of(self, plan, profile=0):
        """The shapes of one plan's steps in one profile, in their order; those of 0 are all decode steps'."""
        found = [(where, shapes) for name, where, shapes in self.runs if name == plan]
        return [shapes for where, shapes in found if where == profile or profile == 0 and where > 1]


def _read(reader):
    """All that a stream reader gives, asked for as TensorRT does: in pieces, and again for what did not come."""
    assert reader.seek(0, types.SimpleNamespace(name="SET"))
    content = b""
    while piece := reader.read(1 << 30, 0):
        content += piece
    return content


@functools.cache
def _session(graph, vocab_size):
    """A file's, or that of one of the sampler's graphs."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.enable_mem_pattern = False
    options.log_severity_level = 3  # it says for each step that the cache is copied
    options.intra_op_num_threads = 1
    if graph in (GREEDY, SAMPLER):
        graph = ir.to_proto(write_sampler(vocab_size, graph == GREEDY)).SerializeToString()
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class FakeEngine:
    def __init__(self, trt, name):
        self.trt, self.name = trt, name
        weakref.finalize(self, trt.cuda.ended.append, "engine")
        self.decodes = name in (PLAN, DECODE)
        self.session = _session(trt.graph if self.decodes else name, trt.manifest["model"]["vocab_size"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}
        if name == PLAN and "split_attention" in trt.manifest["lowerings"]:  # the file's graph has the other form alone
            self.inputs["decode_rows"] = types.SimpleNamespace(type="tensor(int64)", shape=["decode_rows"])
        takes = name == DECODE or name == PLAN and "weight_inputs" in trt.manifest["lowerings"]
        self.weights = trt.weight_inputs if takes else {}
        if name == DECODE:  # as every plan of one row with packed products; the file's graph has none
            self.outputs[UNREAD] = types.SimpleNamespace(type="tensor(float16)", shape=[96])
            for each, (_, _, shape) in trt.manifest["one_row"]["profile"]["shapes"].items():
                if each.startswith(VALUE_ROWS):
                    kind = self.inputs[each.replace(VALUE_ROWS, "past_value_")].type
                    self.inputs[each] = types.SimpleNamespace(type=kind, shape=["N", *shape[1:]])
        self.names = [*self.inputs, *self.weights, *self.outputs]
        self.num_io_tensors = len(self.names)
        self.streamable_weights_size = 0
        if name == PLAN and "WEIGHT_STREAMING" in trt.manifest["flags"]:
            self.streamable_weights_size = trt.weights
        elif name == PLAN and trt.weights:
            self._hold(trt.weights)

    def _hold(self, size):
        address = self.trt.cuda.take(size)
        assert address is not None, "TensorRT has no room for the weights"
        weakref.finalize(self, self.trt.cuda.give, address)

    @property
    def num_optimization_profiles(self):
        return len(self.trt.manifest["profiles"]) if self.name == PLAN else 1

    def get_tensor_name(self, index):
        return self.names[index]

    def get_tensor_mode(self, name):
        return types.SimpleNamespace(name="OUTPUT" if name in self.outputs else "INPUT")

    def get_tensor_shape(self, name):
        if name in self.weights:
            return (len(self.weights[name]),)
        if self.decodes and name in self.inputs and not name.startswith(VALUE_ROWS):
            return (-1, *self.trt.manifest["profiles"][0]["shapes"][name][1][1:])
        return tuple(size if isinstance(size, int) else -1 for size in (self.inputs | self.outputs)[name].shape)

    def get_tensor_dtype(self, name):
        if name in self.weights:
            return types.SimpleNamespace(name="UINT8", itemsize=1)
        said, kind = KINDS[(self.inputs | self.outputs)[name].type]
        return types.SimpleNamespace(name=said, itemsize=np.dtype(kind).itemsize)

    def get_aliased_input_tensor(self, name):
        return name.replace("present_", "past_") if name.startswith("present_") else None

    def bounds(self, profile):
        """(min, opt, max) of each input."""
        manifest = self.trt.manifest
        if self.name == PLAN:
            return manifest["profiles"][profile]["shapes"]
        if self.name == DECODE:
            fixed = {name: (1, *self.get_tensor_shape(name)[1:]) for name in self.inputs if name != "kv_range"}
            return {name: [shape] * 3 for name, shape in fixed.items()} | manifest["one_row"]["profile"]["shapes"]
        assert profile == 0
        rows, batch, capacity = (manifest[name] for name in ("check_rows", "max_batch", "capacity"))
        most = rows * batch if self.name == GREEDY else max(rows, batch)
        sizes = {"B": (1, 1, most), "N": (1, capacity, capacity)}
        return {
            name: list(zip(*(sizes.get(size, (size,) * 3) for size in value.shape)))
            for name, value in self.inputs.items()
        }

    def activations(self, shapes):
        if not self.decodes:
            return 500 * shapes["logits"][0]
        rows = int(np.prod(shapes["input_ids"])) * shapes["logits_index"][1]
        return 1000 * rows + self.weight_streaming_scratch_memory_size

    def get_device_memory_size_for_profile_v2(self, profile):
        return self.activations({name: high for name, (_, _, high) in self.bounds(profile).items()})

    @property
    def weight_streaming_scratch_memory_size(self):
        """Room for the largest weight, twice, as soon as one is streamed; contexts ask for it with their activations."""
        streams = self.streamable_weights_size and self.trt.budgets[-1] < self.streamable_weights_size
        return 2 * self.trt.manifest["memory"]["largest_weight"] if streams else 0

    @property
    def weight_streaming_budget_v2(self):
        return self.trt.budgets[-1]

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget):
        assert not self.trt.contexts, "the budget cannot change while contexts exist"
        assert 0 <= budget <= self.streamable_weights_size
        self.trt.budgets.append(budget)
        self._hold(budget)

    def create_runtime_config(self):
        config = types.SimpleNamespace(strategy="static", cache=None, cuda_graph_strategy=None)
        config.set_execution_context_allocation_strategy = lambda strategy: setattr(config, "strategy", strategy)
        config.create_runtime_cache = FakeRuntimeCache
        config.set_runtime_cache = lambda cache: setattr(config, "cache", cache)
        return config

    def create_execution_context(self, config):
        assert config.dynamic_shapes_kernel_specialization_strategy in (0, 1, 2)
        assert config.cuda_graph_strategy == "disabled", "a capture within a capture"
        self.trt.strategies.append(config.dynamic_shapes_kernel_specialization_strategy)
        kernels = config.cache.kernels if config.cache else set()
        if self.name not in kernels:
            self.trt.compiled.append(self.name)
            kernels.add(self.name)
        return FakeContext(self, config.strategy)


def _as_heads(values, wanted):
    """A cache as the file's graph takes it, of one in which the values of a token lie side by side; others as they are."""
    if values.ndim == 4 and values.shape[3] != wanted[3]:
        values = values.reshape(*values.shape[::2], *wanted[1::2]).transpose(0, 2, 1, 3)
    return values


def _as_rows(values):
    """The reverse."""
    batch, heads, capacity, dim = values.shape
    return values.transpose(0, 2, 1, 3).reshape(batch, 1, capacity, heads * dim)


class FakeContext:
    def __init__(self, engine, strategy):
        self.engine, self.trt, self.cuda, self.strategy = engine, engine.trt, engine.trt.cuda, strategy
        self.shapes, self.addresses, self.memory, self.profile = {}, {}, None, None
        self.trt.contexts.add(self)
        weakref.finalize(self, self.cuda.ended.append, "context")

    def set_optimization_profile_async(self, profile, stream):
        assert self.profile is None and stream in self.cuda.streams and not self.cuda.capturing
        self.profile, self.bounds = profile, self.engine.bounds(profile)
        if self.strategy != "user":
            count = self.engine.num_optimization_profiles
            profiles = range(count) if self.strategy == "static" else [profile]
            size = max(
                self.engine.activations({name: bound[2] for name, bound in self.engine.bounds(each).items()})
                for each in profiles
            )
            self.memory = (self.cuda.take(size), size)
            weakref.finalize(self, self.cuda.give, self.memory[0])
        return True

    def set_input_shape(self, name, shape):
        low, _, high = self.bounds[name]
        if self.shapes.get(name) != tuple(shape) and self.strategy == "user":
            self.memory = None  # until it is asked again how much it needs
        self.shapes[name] = tuple(shape)
        return len(shape) == len(low) and all(a <= b <= c for a, b, c in zip(low, shape, high))

    def get_tensor_shape(self, name):
        """An output's from the inputs': dimensions of one name are equal."""
        if name in self.engine.weights:
            return self.engine.get_tensor_shape(name)
        if name in self.engine.inputs:
            return self.shapes[name]
        sizes = {}
        for each, value in self.engine.inputs.items():
            for symbol, size in zip(value.shape, self.shapes[each]):
                assert not isinstance(symbol, str) or sizes.setdefault(symbol, size) == size, (each, symbol)
        return tuple(size if isinstance(size, int) else sizes[size] for size in self.engine.outputs[name].shape)

    def set_tensor_address(self, name, address):
        assert name in self.engine.names and address % 256 == 0
        self.addresses[name] = address
        return True

    def update_device_memory_size_for_shapes(self):
        assert self.strategy == "user" and self.shapes.keys() == self.engine.inputs.keys()
        self.needed = self.engine.activations(self.shapes)
        return self.needed

    def set_device_memory(self, address, size):
        assert self.strategy == "user" and size >= self.needed and address % 256 == 0
        self.memory = (address, size)

    def execute_async_v3(self, stream):
        """Shapes and addresses are those of now, the memory's content that of when the stream comes to it."""
        assert stream in self.cuda.streams and self.memory is not None, "the activations have no memory"
        engine, cuda, memory, graph = self.engine, self.cuda, self.memory, self.engine.session
        kinds = {name: KINDS[value.type][1] for name, value in (engine.inputs | engine.outputs).items()}
        where = {}
        for name, kind in kinds.items():
            shape = self.get_tensor_shape(name)
            where[name] = self.addresses[name], shape, int(np.prod(shape)) * np.dtype(kind).itemsize
        aliases = {name: engine.get_aliased_input_tensor(name) for name in engine.outputs}
        for name, alias in aliases.items():
            assert alias is None or where[name][0] == where[alias][0], f"{name} is not updated in place"
        runs, entry = self.trt.runs, [engine.name, self.profile, dict(self.shapes)]
        inputs, outputs = list(engine.inputs), list(engine.outputs)

        def array(name):
            address, shape, size = where[name]
            return np.frombuffer(cuda.inside(address, size), kinds[name]).reshape(shape)

        weights = {self.addresses[name]: content for name, content in engine.weights.items()}

        def run():
            for address, content in weights.items():
                assert bytes(cuda.inside(address, len(content))) == content, "a weight is not where it was bound"
            # Activations are scratch, and an output may be written before an input is read.
            ctypes.memset(memory[0], RESERVED, memory[1])
            for name in outputs:
                if aliases[name] is None:
                    ctypes.memset(where[name][0], RESERVED, where[name][2])
            runs.append(entry)
            feeds = {}
            for name in inputs:
                if name.startswith(VALUE_ROWS):
                    cache = name.replace(VALUE_ROWS, "past_value_")
                    assert where[name][0] == where[cache][0] and where[cache][1][0] == 1, (
                        "it is not where a cache begins"
                    )
                    assert np.prod(where[name][1][:2]) == len(array("kv_range")), "it is not the rows in sight"
                elif name != "decode_rows":
                    feeds[name] = _as_heads(array(name), engine.inputs[name].shape)
            read = [name for name in outputs if name != UNREAD]
            for name, values in zip(read, graph.run(read, feeds)):
                shape = where[aliases[name]][1] if aliases[name] else values.shape
                array(name).reshape(shape)[...] = values if values.shape == shape else _as_rows(values)

        regions = [memory, *((address, size) for address, _, size in where.values())]
        cuda.calls["enqueue"] += 1
        cuda.put(Work(regions, run, weakref.ref(self)))
        return True
