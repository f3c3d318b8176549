"""The NVIDIA GPUs of this machine, asked through the driver's own library, which needs no Python package."""

import ctypes
from dataclasses import dataclass

_NAMES = ("libcuda.so.1", "nvcuda.dll")
_NVML = ("libnvidia-ml.so.1", "nvml.dll")
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


@dataclass(frozen=True)
class Gpu:
    """``compute_capability`` as in "8.6"; ``memory`` in bytes; ``bus_id`` names it to NVML ("0000:3b:00.0"), ``driver``
    is the driver's version, empty if unknown."""

    index: int
    name: str
    compute_capability: str
    memory: int
    bus_id: str = ""
    driver: str = ""


@dataclass(frozen=True)
class Gpus:
    """``cuda`` is the newest CUDA version that the driver runs ("13.0"), ``driver`` its own version, empty if unknown;
    ``problem`` says in a sentence why there are no GPUs, and is empty where there are some."""

    gpus: tuple[Gpu, ...]
    driver: str = ""
    cuda: str = ""
    problem: str = ""


def find_gpus() -> Gpus:
    """Asks libcuda (CUDA driver API) and NVML; creates no context, so it takes no GPU memory."""
    library = _load(_NAMES)
    if library is None:
        return Gpus((), problem="no NVIDIA driver is installed (libcuda is missing)")
    driver, cuda = _driver_version(), _cuda_version(library)
    status = library.cuInit(0)
    if status:
        return Gpus((), driver, cuda, f"the NVIDIA driver does not start ({_error(library, status)})")
    count = ctypes.c_int()
    status = library.cuDeviceGetCount(ctypes.byref(count))
    if status or not count.value:
        return Gpus((), driver, cuda, "the NVIDIA driver sees no GPU")
    return Gpus(tuple(_gpu(library, index, driver) for index in range(count.value)), driver, cuda)


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def free_bytes(gpu: Gpu) -> int | None:
    """Bytes of ``gpu``'s memory that are free, asked of NVML, so that no CUDA context takes some of it; None where NVML
    does not tell."""
    nvml, handle, memory = _load(_NVML), ctypes.c_void_p(), _Memory()
    if nvml is None or not gpu.bus_id or nvml.nvmlInit_v2():
        return None
    status = nvml.nvmlDeviceGetHandleByPciBusId_v2(gpu.bus_id.encode(), ctypes.byref(handle))
    status = status or nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    nvml.nvmlShutdown()
    return None if status else memory.free


def _load(names: tuple[str, ...]) -> ctypes.CDLL | None:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _gpu(library: ctypes.CDLL, index: int, driver: str) -> Gpu:
    bus_id = ctypes.create_string_buffer(32)
    device, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.cuDeviceGet(ctypes.byref(device), index)
    library.cuDeviceGetName(name, len(name), device)
    library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    library.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    library.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    if library.cuDeviceGetPCIBusId(bus_id, len(bus_id), device):
        bus_id.value = b""
    capability = f"{major.value}.{minor.value}"
    return Gpu(index, name.value.decode(errors="replace"), capability, memory.value, bus_id.value.decode(), driver)


def _cuda_version(library: ctypes.CDLL) -> str:
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)):
        return ""
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _driver_version() -> str:
    nvml = _load(_NVML)
    if nvml is None or nvml.nvmlInit_v2():
        return ""
    text = ctypes.create_string_buffer(80)
    status = nvml.nvmlSystemGetDriverVersion(text, len(text))
    nvml.nvmlShutdown()
    return "" if status else text.value.decode(errors="replace")


def _error(library: ctypes.CDLL, status: int) -> str:
    text = ctypes.c_char_p()
    if library.cuGetErrorString(status, ctypes.byref(text)) or not text.value:
        return f"CUDA error {status}"
    return text.value.decode(errors="replace")
