"""CUDA memory, a stream and graphs captured from it for a session, through NVIDIA's cuda-bindings; no torch."""

import ctypes
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from llmtrt.errors import CannotRunHere, UserError

INSTALL = "pip install 'cuda-bindings==12.*'"  # 12 works with every driver that runs our engines; 13 needs driver 580


class Region(NamedTuple):
    """``size`` bytes of device memory from ``address`` on."""

    address: int
    size: int


class Cuda:
    """One device's memory and one stream of work on it. ``close`` frees all that was made through it.

    Raises CannotRunHere if cuda-bindings is missing and if the device does not start, UserError if its memory does not
    suffice; any other CUDA error is a RuntimeError.
    """

    def __init__(self, device: int = 0):
        self._rt = _import()
        self._device: dict[int, int] = {}  # address → bytes
        self._host: set[int] = set()
        self._graphs: list[Any] = []
        self._events: list[Any] = []
        self._call("cudaSetDevice", device)
        self._stream = self._call("cudaStreamCreateWithFlags", self._rt.cudaStreamNonBlocking)

    @property
    def stream(self) -> int:
        """The stream's handle, as TensorRT takes it."""
        return int(self._stream)

    def free_bytes(self) -> int:
        """Bytes of device memory that are free now."""
        free, _ = self._call("cudaMemGetInfo")
        return free

    def allocate(self, size: int) -> int:
        """The address of ``size`` bytes of device memory (at least 256-byte aligned), whatever they hold."""
        address = int(self._call("cudaMalloc", max(size, 1)))
        self._device[address] = size
        return address

    def zero(self, address: int, width: int, pitch: int, rows: int) -> None:
        """Zeroes ``width`` bytes of each of ``rows`` rows that lie ``pitch`` bytes apart, in the stream's order."""
        self._call("cudaMemset2DAsync", address, pitch, 0, width, rows, self._stream)

    def free(self, address: int) -> None:
        """Frees what ``allocate`` gave, once the stream's work is done; 0 is ignored."""
        if address:
            self.synchronize()
            self._call("cudaFree", address)
            del self._device[address]

    def pinned(self, count: int, dtype: type) -> np.ndarray:
        """A host array of ``count`` elements that the device copies to and from without staging."""
        size = max(1, count * np.dtype(dtype).itemsize)
        address = int(self._call("cudaMallocHost", size))
        self._host.add(address)
        return np.frombuffer((ctypes.c_byte * size).from_address(address), dtype, count)

    def free_pinned(self, array: np.ndarray) -> None:
        """Frees what ``pinned`` gave; the array must not be used again."""
        self.synchronize()
        self._call("cudaFreeHost", array.ctypes.data)
        self._host.discard(array.ctypes.data)

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copies a contiguous array to the device, in the stream's order."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self._stream)

    def download(self, array: np.ndarray, address: int) -> None:
        """Copies from the device into a contiguous array, in the stream's order; ``synchronize`` before reading it."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self._stream)

    def copy(self, to: Region, source: Region) -> None:
        """Copies ``source`` to the start of ``to``, both on the device, in the stream's order."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpyAsync", to.address, source.address, source.size, kind, self._stream)

    def copy_2d(self, to: int, source: int, width: int, pitch: int, height: int) -> None:
        """Copies ``height`` pieces of ``width`` bytes that begin ``pitch`` bytes apart, from address ``source`` to ``to``,
        both on the device, in the stream's order."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpy2DAsync", to, pitch, source, pitch, width, height, kind, self._stream)

    def capture(self, work: Callable[[], None], edit: Callable[[int], Any] = lambda graph: None) -> Any:
        """What ``work`` puts on the stream as a graph; nothing of it runs now. ``edit`` may change the attributes of the
        graph's nodes before it is instantiated. It is to be launched soon: while a graph was never launched, each kernel of
        every other begins 0.35 µs later, 13 % of a small model's token (H100, driver 580).

        Relaxed, so that ``work`` may set up what it needs on other streams, as TensorRT does for new shapes."""
        mode = self._rt.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        self._call("cudaStreamBeginCapture", self._stream, mode)
        try:
            work()
        except BaseException:
            with suppress(RuntimeError):  # of what is raised already
                self._call("cudaGraphDestroy", self._call("cudaStreamEndCapture", self._stream))
            raise
        graph = self._call("cudaStreamEndCapture", self._stream)
        try:
            edit(int(graph))
            self._graphs.append(self._call("cudaGraphInstantiate", graph, 0))
        finally:
            self._rt.cudaGraphDestroy(graph)
        return self._graphs[-1]

    def launch(self, graph: Any) -> None:
        """Runs what ``capture`` gave, in the stream's order."""
        self._call("cudaGraphLaunch", graph, self._stream)

    def drop_graphs(self) -> None:
        """Destroys every graph, once the stream's work is done."""
        self.synchronize()
        for graph in self._graphs:
            self._call("cudaGraphExecDestroy", graph)
        self._graphs = []

    def event(self) -> Any:
        """An event for ``record`` and ``wait``."""
        self._events.append(self._call("cudaEventCreateWithFlags", self._rt.cudaEventDisableTiming))
        return self._events[-1]

    def record(self, event: Any) -> None:
        """Marks what is on the stream by now."""
        self._call("cudaEventRecord", event, self._stream)

    def wait(self, event: Any) -> None:
        """Waits on the host until what ``record`` marked is done; raises what went wrong in it."""
        self._call("cudaEventSynchronize", event)

    def synchronize(self) -> None:
        """Waits until the stream's work is done; raises what went wrong in it."""
        self._call("cudaStreamSynchronize", self._stream)

    def finish(self) -> None:
        """Waits until nothing uses the memory any more and destroys every graph; unlike ``synchronize`` it raises
        nothing."""
        if self._stream is not None:
            self._rt.cudaStreamSynchronize(self._stream)
        for graph in self._graphs:
            self._rt.cudaGraphExecDestroy(graph)
        self._graphs = []

    def close(self) -> None:
        """Frees everything, after an error too; calling it twice is fine."""
        if self._stream is None:
            return
        self.finish()
        rt, stream, self._stream = self._rt, self._stream, None
        for event in self._events:
            rt.cudaEventDestroy(event)
        for address in self._device:
            rt.cudaFree(address)
        for address in self._host:
            rt.cudaFreeHost(address)
        self._events, self._device, self._host = [], {}, set()
        rt.cudaStreamDestroy(stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *results = getattr(self._rt, name)(*arguments)
        errors = self._rt.cudaError_t
        if status != errors.cudaSuccess:
            self._rt.cudaGetLastError()  # or the next call that asks would report this one again
            text = self._rt.cudaGetErrorString(status)[1].decode(errors="replace")
            if status == errors.cudaErrorMemoryAllocation:
                raise no_room("the memory that is needed", f"{name}: {text}")
            if status in (
                errors.cudaErrorInsufficientDriver,
                errors.cudaErrorNoDevice,
                errors.cudaErrorInvalidDevice,
                errors.cudaErrorDevicesUnavailable,
                errors.cudaErrorInitializationError,
            ):
                raise CannotRunHere(f"the GPU cannot be used ({text}): `llmtrt doctor` shows driver and CUDA versions")
            raise RuntimeError(f"{name} failed: {text}")
        return results[0] if len(results) == 1 else tuple(results)


def no_room(needed: str, said: str) -> UserError:
    """The GPU lacks memory for what is ``needed``, as CUDA or TensorRT ``said``."""
    return UserError(
        f"the GPU has no room for {needed} ({said}): close other programs, or use a smaller max_batch or an engine with a "
        "smaller --max-seq"
    )


def _import() -> ModuleType:
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise CannotRunHere(
            f"an engine needs cuda-bindings, which cannot be imported ({error}): install it with `{INSTALL}`"
        ) from None
    return runtime
