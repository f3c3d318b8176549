"""The session on a TensorRT engine: weights, KV cache and activations in the memory of one GPU."""

import mmap
from typing import Any

import numpy as np

from llmtrt.engine.flavor import choose
from llmtrt.engine.gpu import Gpu, find_gpus
from llmtrt.engine.logger import make_logger
from llmtrt.engine.manifest import Engine
from llmtrt.engine.refit import refit
from llmtrt.errors import UserError
from llmtrt.package import WEIGHTS
from llmtrt.runtime.cuda import Cuda

_DECODE, _PREFILL = 0, 1  # profiles of the engine
_ALIGNMENT = 256
_SMALLEST_CONTEXT = 256  # the KV range is rounded up to powers of two from here on: each length is a shape of its own
_INPUTS = ("input_ids", "positions", "logits_index")
_WHY = {
    "VERSION_MISMATCH": "it was built by another TensorRT version",
    "UNSUPPORTED_CC": "it was not built for this GPU's compute capability",
    "OLD_CUDA_DRIVER": "the NVIDIA driver is too old",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old",
    "INSUFFICIENT_GPU_MEMORY": "the GPU has too little memory",
    "MALFORMED_ENGINE": "the plan is damaged",
    "CUDA_ERROR": "CUDA reports an error",
}


class TrtSession:
    """A ``Session`` on TensorRT, on the machine's first GPU.

    One execution context for decode (S = K = 1) and one for prefill share the weights, the KV cache, which each layer
    updates in place, and one block of activation memory, since they never run at the same time.

    ``kernel_specialization`` (LAZY, EAGER, NONE; TensorRT-RTX alone has it): how kernels are chosen for shapes, by
    default as the engine's manifest records it. ``weight_budget``: bytes of weights to keep on the GPU, of an engine
    that was built to stream them; by default as many as fit. ``verify``: whether the package that a plan without
    weights is filled from is compared with its SHA-256.

    Raises UserError if there is no GPU or driver, if the engine's flavor is not installed or has another version, if
    the plan does not fit the GPU, is damaged, or has no weights and its package is not found, and if the weights and
    the cache of one sequence need more memory than is free.
    """

    def __init__(
        self,
        engine: Engine,
        kernel_specialization: str | None = None,
        weight_budget: int | None = None,
        verify: bool = True,
    ):
        gpu = _find_gpu(engine)
        self._flavor = choose(engine.flavor, need="run")
        if self._flavor.version != engine.flavor_version:
            raise UserError(
                f"{engine.path} was built with TensorRT {engine.flavor} {engine.flavor_version} and "
                f"{self._flavor.version} is installed: install that version, or build the engine anew"
            )
        self.spec, self.chunk = engine.spec, engine.chunk
        self._folder, self._max_batch, self._max_seq = engine.path, engine.max_batch, engine.max_seq
        self._capacity = engine.capacity
        self._logger = make_logger(self._flavor)
        self._cuda = Cuda(gpu.index)
        self._runtime = self._engine = None
        self._contexts: list[Any] = []
        self._prepared: list[tuple | None] = [None, None]
        self._slots = 0  # that memory was taken for
        self._reserved = (0, 0)  # slots and rows of each that may be used
        self._kv = self._activations = self._device_inputs = self._device_logits = 0
        self._activation_bytes = 0
        self._host_inputs = self._host_logits = None
        try:
            self._load(engine, weight_budget, verify)
            specialization = kernel_specialization or engine.manifest.get("runtime", {}).get("kernel_specialization")
            self._contexts = [self._make_context(profile, specialization) for profile in (_DECODE, _PREFILL)]
            self._caches = self._find_caches()
            self._range = self._cuda.allocate(self._capacity * 8)
            self._cuda.upload(self._range, np.arange(self._capacity, dtype=np.int64))
            self._cuda.synchronize()
        except BaseException:
            self.close()
            raise
        kernels = f", {specialization} kernel specialization" if self._flavor.can("kernel_specialization") else ""
        self.description = f"TensorRT {self._flavor.name} {self._flavor.version}, {gpu.name}{kernels}"

    def reserve(self, slots: int, max_seq: int) -> None:
        """See ``Session``; the cache of each slot has the rows that the engine was built for."""
        if self._engine is None:
            raise UserError(f"{self._folder} is closed: load it again")
        if slots > self._max_batch:
            raise UserError(
                f"{self._folder} runs {self._max_batch} sequences at a time, not {slots}: ask for fewer, or "
                f"build it with --max-batch {slots}"
            )
        if max_seq > self._max_seq:
            raise UserError(
                f"{self._folder} was built for {self._max_seq} tokens, not {max_seq}: ask for fewer, or build "
                f"it with --max-seq {max_seq}"
            )
        if slots > self._slots:
            self._free_slots()
        self._reserved = (0, 0)
        self._require_memory(slots, max_seq)
        if slots > self._slots:
            self._allocate_slots(slots)
        rows = min(self._capacity, max_seq + self.chunk)
        self._zero_caches(slots, _context_bucket(rows, self._capacity))
        self._reserved = slots, rows

    def step(self, input_ids: np.ndarray, positions: np.ndarray, logits_index: np.ndarray) -> np.ndarray:
        """See ``Session``."""
        batch, rows = input_ids.shape
        wanted, last = logits_index.shape[1], int(positions.max())
        slots, room = self._reserved
        if batch > slots or rows > self.chunk or last >= room:
            # TensorRT would drop the rows beyond the cache without a word.
            raise ValueError(f"a step of {batch} × {rows} rows up to position {last} is more than what was reserved")
        profile = _DECODE if rows == wanted == 1 else _PREFILL
        context = self._contexts[profile]
        self._prepare(profile, (batch, rows, wanted, _context_bucket(last + 1, self._capacity)))
        cuda, size = self._cuda, self._slots * self.chunk
        for index, values in enumerate((input_ids, positions, logits_index)):
            staged = self._host_inputs[index * size : index * size + values.size]
            staged[:] = values.reshape(-1)
            cuda.upload(self._device_inputs + index * size * 8, staged)
        self._logger.clear()
        if not context.execute_async_v3(cuda.stream):
            raise RuntimeError(f"TensorRT could not run a step: {self._logger.reason() or 'it gave no reason'}")
        logits = self._host_logits[: batch * wanted * self.spec.vocab_size]
        cuda.download(logits, self._device_logits)
        cuda.synchronize()
        return logits.reshape(batch, wanted, self.spec.vocab_size).copy()

    def close(self) -> None:
        """See ``Session``."""
        # Contexts use the stream and the memory, and each object of TensorRT the one that made it.
        self._cuda.finish()
        self._contexts = []
        self._engine = None
        self._runtime = None
        self._cuda.close()
        self._slots, self._reserved = 0, (0, 0)

    def _load(self, engine: Engine, weight_budget: int | None, verify: bool) -> None:
        trt, streams = self._flavor.module, "WEIGHT_STREAMING" in engine.manifest["flags"]
        size, free = _weight_bytes(engine), self._cuda.free_bytes()
        cache = self._capacity * self.spec.kv_bytes_per_token()
        if not streams and size + cache > free:
            raise UserError(
                f"{engine.path} needs about {_gb(size)} GB of GPU memory for weights and {_gb(cache)} GB for the KV "
                f"cache of one sequence, but {_gb(free)} GB are free: build it with fewer bits, --weight-streaming or "
                "a smaller --max-seq"
            )
        try:
            self._runtime = trt.Runtime(self._logger)
        except TypeError as error:  # how the bindings report that there is none
            reason = self._logger.reason() or str(error)
            raise UserError(
                f"TensorRT {self._flavor.name} {self._flavor.version} does not start ({reason}): `llmtrt doctor` shows "
                "driver and CUDA versions"
            ) from None
        if engine.plan.stat().st_size:
            with engine.plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
                self._engine = self._runtime.deserialize_cuda_engine(plan)
                why = self._why_not(plan) if self._engine is None else ""
        else:
            why = _WHY["MALFORMED_ENGINE"]
        if self._engine is None:
            raise UserError(
                f"TensorRT {self._flavor.name} {self._flavor.version} does not load {engine.plan} ({why}): build "
                "the engine anew with `llmtrt build` for this machine"
            )
        if "STRIP_PLAN" in engine.manifest["flags"]:
            refit(self._flavor, self._engine, engine, self._logger, verify)
        if streams:
            streamable, free = self._engine.streamable_weights_size, self._cuda.free_bytes()
            # The automatic budget has been seen to be negative, so it is not asked.
            fits = max(0, free - cache - free // 8)
            self._engine.weight_streaming_budget_v2 = min(streamable, fits if weight_budget is None else weight_budget)

    def _why_not(self, plan: mmap.mmap) -> str:
        """Why a plan did not load, in words; asked only then, for an engine may run where it is called unfit."""
        reasons = []
        if self._flavor.can("engine_validity"):
            _, bits = self._runtime.get_engine_validity(plan)
            members = self._flavor.module.EngineInvalidityDiagnostics.__members__
            reasons = [_WHY.get(name, name) for name, member in members.items() if int(bits) & int(member)]
        return " and ".join(reasons) or self._logger.reason() or "it gave no reason"

    def _make_context(self, profile: int, specialization: str | None) -> Any:
        trt, engine = self._flavor.module, self._engine
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._flavor.can("runtime_config"):
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            if self._flavor.can("kernel_specialization") and specialization:
                kinds = trt.DynamicShapesKernelSpecializationStrategy.__members__
                if specialization not in kinds:
                    raise UserError(f"kernel_specialization should be {', '.join(kinds)}, but is {specialization!r}")
                config.dynamic_shapes_kernel_specialization_strategy = kinds[specialization]
            if self._flavor.can("cuda_graphs"):
                config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context(strategy)
        if context is None or not context.set_optimization_profile_async(profile, self._cuda.stream):
            raise UserError(
                f"TensorRT cannot make an execution context of {self._folder}: "
                f"{self._logger.reason() or 'it gave no reason'}"
            )
        self._cuda.synchronize()
        return context

    def _find_caches(self) -> list[tuple[str, str, tuple[int, ...], int]]:
        """For each KV tensor the names of input and output, its shape without the batch, and its bytes per slot."""
        engine, caches = self._engine, []
        for index in range(engine.num_io_tensors):
            past = engine.get_tensor_name(index)
            if past.startswith("past_"):
                present = past.replace("past_", "present_", 1)
                if engine.get_aliased_input_tensor(present) != past:
                    raise UserError(f"{self._folder}: {present} is not updated in place: build the engine anew")
                shape = tuple(engine.get_tensor_shape(past))[1:]
                size = int(np.prod(shape)) * engine.get_tensor_dtype(past).itemsize
                caches.append((past, present, shape, size))
        if len(caches) != 2 * self.spec.layers or any(shape[1] != self._capacity for _, _, shape, _ in caches):
            raise UserError(
                f"{self._folder}: the plan's KV cache is not the one that the manifest describes: build the "
                "engine anew with `llmtrt build`"
            )
        return caches

    def _require_memory(self, slots: int, max_seq: int) -> None:
        """UserError, before anything is allocated, if cache and activations of ``slots`` sequences do not fit; takes
        the memory for activations."""
        length = _context_bucket(min(self._capacity, max_seq + self.chunk), self._capacity)
        activations = max(
            self._set_shapes(_DECODE, (slots, 1, 1, length)),
            self._set_shapes(_PREFILL, (slots, min(self.chunk, max_seq), 1, length)),
        )
        cache = sum(_aligned(slots * size) for *_, size in self._caches) if slots > self._slots else 0
        free = self._cuda.free_bytes() + self._activation_bytes
        if cache + activations > free:
            raise UserError(
                f"{slots} sequences need {_gb(cache)} GB of GPU memory for the KV cache and {_gb(activations)} GB for "
                f"activations beside the weights, but {_gb(free)} GB are free: use a smaller max_batch, or build the "
                "engine with a smaller --max-seq or --chunk"
            )
        self._grow_activations(activations)

    def _allocate_slots(self, slots: int) -> None:
        cuda = self._cuda
        self._kv = cuda.allocate(sum(_aligned(slots * size) for *_, size in self._caches))
        places, offset = {"kv_range": self._range}, 0
        for past, present, _, size in self._caches:
            places[past] = places[present] = self._kv + offset
            offset += _aligned(slots * size)
        self._device_inputs = cuda.allocate(len(_INPUTS) * slots * self.chunk * 8)
        self._host_inputs = cuda.pinned(len(_INPUTS) * slots * self.chunk, np.int64)
        places |= {name: self._device_inputs + index * slots * self.chunk * 8 for index, name in enumerate(_INPUTS)}
        for context in self._contexts:
            for name, place in places.items():
                self._set_address(context, name, place)
        self._slots = slots

    def _zero_caches(self, slots: int, rows: int) -> None:
        """Zeroes the first ``rows`` rows of ``slots`` slots: what nobody wrote has weight 0 in attention, and 0 times
        what an earlier request left there may be NaN."""
        offset = 0
        for _, _, (heads, capacity, _), size in self._caches:
            pitch = size // heads
            self._cuda.zero(self._kv + offset, pitch // capacity * rows, pitch, slots * heads)
            offset += _aligned(self._slots * size)

    def _set_address(self, context: Any, name: str, address: int) -> None:
        if not context.set_tensor_address(name, address):
            raise RuntimeError(
                f"TensorRT refuses the memory for {name}: {self._logger.reason() or 'it gave no reason'}"
            )

    def _free_slots(self) -> None:
        self._slots = 0
        self._cuda.free(self._kv)
        self._cuda.free(self._device_inputs)
        if self._host_inputs is not None:
            self._cuda.free_pinned(self._host_inputs)
        self._kv = self._device_inputs = 0
        self._host_inputs = None

    def _prepare(self, profile: int, shapes: tuple[int, int, int, int]) -> None:
        """Makes the context of ``profile`` ready for a step of B, S, K, L = ``shapes``, unless it is."""
        if self._prepared[profile] == shapes:
            return
        batch, _, wanted, _ = shapes
        count = batch * wanted * self.spec.vocab_size
        if self._host_logits is None or count > self._host_logits.size:
            self._grow_logits(count)
        self._grow_activations(self._set_shapes(profile, shapes))
        context = self._contexts[profile]
        self._set_address(context, "logits", self._device_logits)
        context.set_device_memory(self._activations, self._activation_bytes)
        self._prepared[profile] = shapes

    def _set_shapes(self, profile: int, shapes: tuple[int, int, int, int]) -> int:
        """Sets the inputs' shapes and returns the bytes of activation memory that they take."""
        batch, rows, wanted, length = shapes
        context = self._contexts[profile]
        self._prepared[profile] = None
        wants = {
            "input_ids": (batch, rows),
            "positions": (batch, rows),
            "logits_index": (batch, wanted),
            "kv_range": (length,),
        } | {past: (batch, *shape) for past, _, shape, _ in self._caches}
        self._logger.clear()
        for name, shape in wants.items():
            if not context.set_input_shape(name, shape):
                raise RuntimeError(f"TensorRT refuses the shape {shape} for {name}: {self._logger.reason()}")
        return context.update_device_memory_size_for_shapes()

    def _grow_activations(self, size: int) -> None:
        if size > self._activation_bytes:
            self._cuda.free(self._activations)
            self._activations = self._activation_bytes = 0
            self._activations, self._activation_bytes = self._cuda.allocate(_aligned(size)), _aligned(size)
            self._prepared = [None, None]  # both contexts still point to the old block

    def _grow_logits(self, count: int) -> None:
        self._cuda.free(self._device_logits)
        self._device_logits = 0
        if self._host_logits is not None:
            self._cuda.free_pinned(self._host_logits)
            self._host_logits = None
        self._device_logits = self._cuda.allocate(count * 4)
        self._host_logits = self._cuda.pinned(count, np.float32)
        self._prepared = [None, None]


def _find_gpu(engine: Engine) -> Gpu:
    found = find_gpus()
    if found.problem:
        raise UserError(f"{engine.path} is an engine and needs an NVIDIA GPU, but {found.problem}")
    gpu, targets = found.gpus[0], engine.compute_capabilities
    if targets and gpu.compute_capability not in targets:
        raise UserError(
            f"{engine.path} was built for compute capability {', '.join(targets)}, but {gpu.name} has "
            f"{gpu.compute_capability}: build it with --compute-capability {gpu.compute_capability}, or without"
        )
    return gpu


def _weight_bytes(engine: Engine) -> int:
    """About what the weights take on the GPU: the plan's size, and the package's weights for a plan without them."""
    size = engine.plan.stat().st_size
    if "STRIP_PLAN" in engine.manifest["flags"] and engine.package_path is not None:
        size += (engine.package_path / WEIGHTS).stat().st_size
    return size


def _context_bucket(length: int, capacity: int) -> int:
    bucket = _SMALLEST_CONTEXT
    while bucket < length:
        bucket *= 2
    return min(bucket, capacity)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}"
