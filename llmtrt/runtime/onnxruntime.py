"""The session on ONNX Runtime's CPU provider: runs a package as it is, with the KV cache updated in place."""

import os
from collections.abc import Sequence
from types import ModuleType

import numpy as np

from llmtrt.errors import UserError
from llmtrt.package import WEIGHTS, ModelSpec, Package
from llmtrt.runtime.memory import available_bytes, require
from llmtrt.runtime.params import check_integer

MINIMUM_VERSION = (1, 24)  # the first that knows opset 24
_MOST_THREADS = 1024  # each takes memory, and ONNX Runtime asks nobody whether there are cores for them
CHUNK = 256  # on SmolLM2 128 and 256 were the fastest of 16 to 512 rows
_RANGE_STEP = 16  # tokens; coarser costs up to 10 % at short contexts, finer makes more shapes for no gain
_TYPES = {"float16": "tensor(float16)", "float32": "tensor(float)"}


class OrtSession:
    """A ``Session`` on ONNX Runtime.

    ``threads``: of one operator (None: every core this process may use). ``accuracy_level``: of INT4 products, as ONNX
    Runtime's MatMulNBits numbers them: 4 computes with INT8 activations and is the fastest, 1 with fp32. ``chunk``: the
    most rows of one step. ``graph``: another form of the package's graph (serialized, its weights in the package's files),
    whose outputs ``debug_tensors`` are those that ``debug_values`` gives.

    Raises UserError if ONNX Runtime is missing or too old, if the graph contradicts the manifest, if the package is in
    bfloat16, or if the model needs more memory than there is.
    """

    def __init__(
        self,
        package: Package,
        threads: int | None = None,
        accuracy_level: int = 4,
        chunk: int = CHUNK,
        graph: bytes | None = None,
        debug_tensors: Sequence[str] = (),
    ):
        ort = require_runnable(package)
        spec = package.spec
        check_integer("accuracy_level", accuracy_level, 0, 4)
        check_integer("threads", threads, 1, _MOST_THREADS, optional=True)
        check_integer("chunk", chunk, 1)
        self.spec = spec
        self.chunk = int(chunk)
        self._path = package.path
        self._ort = ort
        require(_load_bytes(package), f"loading {package.path}", "free some, or quantize to fewer bits")
        options = ort.SessionOptions()
        threads = int(threads or _cores())
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.enable_mem_pattern = False  # plans memory for shapes that come again; ours change every step
        options.log_severity_level = 3
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(accuracy_level))
        source = str(package.graph)
        if graph is not None:
            source = graph
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(package.path))
        try:
            self._session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001 - the library's exceptions have no common type
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"ONNX Runtime {ort.__version__} cannot load {package.graph} ({first})") from None
        inputs = {value.name: value for value in self._session.get_inputs()}
        outputs = {value.name: value for value in self._session.get_outputs()}
        self._debug_tensors = [*debug_tensors]
        _check(inputs, {name: outputs[name] for name in outputs.keys() - {*debug_tensors}}, spec, package)
        self._caches = [
            (f"past_{kind}_{layer}", f"present_{kind}_{layer}")
            for layer in range(spec.layers)
            for kind in ("key", "value")
        ]
        self.description = f"ONNX Runtime {ort.__version__}, CPU, {threads} thread{'s' if threads > 1 else ''}"
        self._bindings: dict[tuple[int, int], object] = {}  # by the slots of a step: the first, and how many
        self._last = None
        self._buffers: list[np.ndarray] = []
        self._capacity = 0

    def reserve(self, slots: int, max_seq: int, keep: Sequence[int] = ()) -> int:
        """See ``Session``. A cache that is there and large enough stays; a new one costs pages only where it is written."""
        if self._session is None:
            raise UserError(f"{self._path} is closed: load it again")
        capacity, old = max_seq + self.chunk, self._buffers if any(keep) else []
        if old:
            have = len(old[0])
            if slots <= have and capacity <= self._capacity:
                return have
            larger, free = (max(slots, have), max(capacity, self._capacity)), available_bytes()
            if free is None or self._needed(*larger) <= free:  # beside the old one
                slots, capacity = larger
            else:
                old = []
        self._release()
        require(
            self._needed(slots, capacity),
            f"a KV cache of {slots} × {capacity} tokens",
            "use a smaller max_seq (or max_tokens) or a smaller max_batch",
        )
        shape = (slots, self.spec.kv_heads, capacity, self.spec.head_dim)
        # Zeros: a row that nobody wrote has weight 0 in attention, and 0 times whatever lies there may be NaN.
        self._buffers = [np.zeros(shape, self.spec.kv_dtype) for _ in self._caches]
        self._written = np.zeros(slots, np.int64)
        kept = min(len(old[0]), len(keep)) if old else 0
        self._written[:kept] = keep[:kept]
        for buffer, before in zip(self._buffers, old):
            for slot, rows in enumerate(keep[:kept]):
                buffer[slot, :, :rows] = before[slot, :, :rows]
        self._capacity = capacity
        self._range = np.arange(capacity, dtype=np.int64)
        return kept

    def step(
        self, input_ids: np.ndarray, positions: np.ndarray, logits_index: np.ndarray, first: int = 0
    ) -> np.ndarray:
        """See ``Session``."""
        binding = self._bound(first, len(input_ids))
        # The range covers rows of padding as well: a row that may attend to nothing would be NaN, and be cached.
        length = min(self._capacity, -(-(int(positions.max()) + 1) // _RANGE_STEP) * _RANGE_STEP)
        feeds = {
            "input_ids": input_ids,
            "positions": positions,
            "logits_index": logits_index,
            "kv_range": self._range[:length],
        }
        for name, value in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value, np.int64))
        for name in (*self._debug_tensors, "logits"):
            binding.bind_output(name, "cpu")
        written = self._written[first : first + len(input_ids)]
        np.maximum(written, positions[:, -1] + 1, out=written)
        self._session.run_with_iobinding(binding)
        self._last = binding
        return binding.get_outputs()[-1].numpy()

    def copy_rows(self, source: int, target: int, rows: int) -> None:
        """See ``Session``."""
        for buffer in self._buffers:
            buffer[target, :, :rows] = buffer[source, :, :rows]
        self._written[target] = max(rows, self._written[target])

    def clear_rows(self, slot: int, start: int) -> None:
        """See ``Session``."""
        for buffer in self._buffers:
            buffer[slot, :, start : self._written[slot]] = 0
        self._written[slot] = start

    def debug_values(self) -> dict[str, np.ndarray]:
        """What the last step computed for each of the ``debug_tensors``."""
        values = self._last.get_outputs()[len(self._caches) : -1]
        return {name: value.numpy() for name, value in zip(self._debug_tensors, values)}

    def close(self) -> None:
        """See ``Session``."""
        self._release()
        self._session = None

    def _needed(self, slots: int, capacity: int) -> int:
        """Bytes of a cache and of the logits of a step."""
        return slots * (capacity * self.spec.kv_bytes_per_token() + self.spec.vocab_size * 4)

    def _bound(self, first: int, slots: int) -> object:
        """The binding of those slots' cache."""
        if (first, slots) not in self._bindings:
            binding = self._session.io_binding()
            for (past, present), buffer in zip(self._caches, self._buffers):
                part = buffer[first : first + slots]
                value = self._ort.OrtValue.ortvalue_from_numpy(part)
                if value.data_ptr() != part.ctypes.data:
                    raise RuntimeError("ONNX Runtime copied the KV cache: it would not be updated in place")
                binding.bind_ortvalue_input(past, value)
                binding.bind_ortvalue_output(present, value)
            self._bindings[first, slots] = binding
        return self._bindings[first, slots]

    def _release(self) -> None:
        self._bindings, self._last = {}, None
        self._buffers = []
        self._capacity = 0


def require_runnable(package: Package) -> ModuleType:
    """The module onnxruntime; UserError if it is missing or too old, or if ``package`` is in a type that it does not run."""
    ort = _import()
    if "bfloat16" in (package.spec.dtype, package.spec.kv_dtype):
        raise UserError(
            f"{package.path} is in bfloat16, which runs on TensorRT only: build an engine with `llmtrt build`, or "
            "quantize the checkpoint again with float16 or float32"
        )
    return ort


def _import() -> ModuleType:
    remedy = 'install it with `pip install "onnxruntime>=1.24"`'
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"ONNX Runtime is needed to run a package and cannot be imported ({error}): {remedy}") from None
    version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    if version < MINIMUM_VERSION:
        raise UserError(f"ONNX Runtime {onnxruntime.__version__} is too old for opset 24: {remedy}")
    return onnxruntime


def _load_bytes(package: Package) -> int:
    """The least that loading was seen to take: the CPU provider multiplies fp16 weights as fp32, and packs INT4
    anew."""
    weights = package.path / WEIGHTS
    size = weights.stat().st_size if weights.is_file() else 0
    return int(size * (1.4 if package.spec.dtype == "float16" else 1.0))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check(inputs: dict, outputs: dict, spec: ModelSpec, package: Package) -> None:
    """The graph's names, types and fixed dimensions against the graph contract and the manifest."""
    kv = (_TYPES[spec.kv_dtype], (None, spec.kv_heads, None, spec.head_dim))
    layers = [(kind, layer) for layer in range(spec.layers) for kind in ("key", "value")]
    integers = "tensor(int64)"
    wanted_inputs = {
        "input_ids": (integers, (None, None)),
        "positions": (integers, (None, None)),
        "logits_index": (integers, (None, None)),
        "kv_range": (integers, (None,)),
    } | {f"past_{kind}_{layer}": kv for kind, layer in layers}
    wanted_outputs = {"logits": ("tensor(float)", (None, None, spec.vocab_size))}
    wanted_outputs |= {f"present_{kind}_{layer}": kv for kind, layer in layers}
    for found, wanted, role in ((inputs, wanted_inputs, "input"), (outputs, wanted_outputs, "output")):
        if found.keys() != wanted.keys():
            name = min(found.keys() ^ wanted.keys())
            state = "lacks the" if name in wanted else "has an unknown"
            raise UserError(f"{package.graph} {state} {role} {name}: make the package anew with `llmtrt quantize`")
        for name, (kind, shape) in wanted.items():
            actual = found[name]
            fits = len(actual.shape) == len(shape) and all(
                want is None or not isinstance(have, int) or have == want for have, want in zip(actual.shape, shape)
            )
            if actual.type != kind or not fits:
                raise UserError(
                    f"{package.graph}: {role} {name} is {actual.type} {actual.shape} where the manifest asks for "
                    f"{kind} {[*shape]}: make the package anew with `llmtrt quantize`"
                )
