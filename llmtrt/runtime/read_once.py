"""Tells the L2 cache what the kernels of a captured graph read once: weights, keys and values.

A decode step reads more of them than L2 holds. Each kernel's weights would displace what the next kernels read again, their
activations and their code: 2 % of a token's time on an H100 (8B shape, INT4), 3 % behind 8,192 tokens. So a kernel that was
given such memory gets an access policy window over it that marks it as streaming (CUDA C++ Programming Guide, L2 cache
control). It is a hint, which changes no result.
"""

import ctypes
from bisect import bisect
from collections.abc import Iterator, Sequence
from operator import attrgetter
from types import ModuleType
from typing import Any

from llmtrt.runtime.cuda import Region

_POINTER = 8  # bytes
_OF_L2 = 2  # weights of no more bytes than so many of it stay in part from step to step


def mark(graph: int, weights: Sequence[Region], caches: Sequence[Region]) -> int:
    """Marks, for each kernel of the CUDA graph, the largest of ``weights`` and ``caches`` that is among its parameters, from
    there on; returns the number of kernels marked: 0 of weights that are small, and with drivers older than CUDA 12.4."""
    if not weights:
        return 0
    from cuda.bindings import driver

    most = _attribute(driver, "MAX_ACCESS_POLICY_WINDOW_SIZE")
    if not most or sum(region.size for region in weights) <= _OF_L2 * _attribute(driver, "L2_CACHE_SIZE"):
        return 0
    regions, layouts, count = sorted({*weights, *caches}), {}, 0
    for node in _kernels(driver, graph):
        size, address = max((_left(regions, word), word) for word in (0, *_parameters(driver, node, layouts)))
        if size:
            count += _stream(driver, node, address, min(size, most))
    return count


def _attribute(driver: ModuleType, name: str) -> int:
    device = _call(driver.cuCtxGetDevice)
    which = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    return 0 if device is None else _call(driver.cuDeviceGetAttribute, which, device) or 0


def _kernels(driver: ModuleType, graph: int) -> Iterator[Any]:
    handle = driver.CUgraph(graph)
    found = _call(driver.cuGraphGetNodes, handle, 0)
    nodes, _ = _call(driver.cuGraphGetNodes, handle, found[1]) if found else ((), 0)
    for node in nodes:
        if _call(driver.cuGraphNodeGetType, node) == driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL:
            yield node


def _parameters(driver: ModuleType, node: Any, layouts: dict[int, list[int]]) -> Iterator[int]:
    """Every word of the kernel's parameters, some of which are addresses, or parts of a structure that are; ``layouts`` has
    the bytes of each function's parameters, as far as they were asked for."""
    launch = _call(driver.cuGraphKernelNodeGetParams, node)
    if launch is None or not int(launch.kernelParams):
        return
    addresses = ctypes.cast(int(launch.kernelParams), ctypes.POINTER(ctypes.c_void_p))
    ask, function = driver.cuFuncGetParamInfo, launch.func
    if not int(function):
        ask, function = driver.cuKernelGetParamInfo, launch.kern
    sizes = layouts.get(int(function))
    if sizes is None:
        sizes = layouts[int(function)] = []
        while (place := _call(ask, function, len(sizes))) is not None:
            sizes.append(place[1])
    for index, size in enumerate(sizes):
        for at in range(0, size - _POINTER + 1, _POINTER):
            yield ctypes.c_uint64.from_address(addresses[index] + at).value


def _left(regions: Sequence[Region], address: int) -> int:
    """Bytes from ``address`` to the end of the last of ``regions``, in their order, that begins before."""
    index = bisect(regions, address, key=attrgetter("address")) - 1
    return 0 if index < 0 else max(0, regions[index].address + regions[index].size - address)


def _stream(driver: ModuleType, node: Any, address: int, size: int) -> bool:
    window, value = driver.CUaccessPolicyWindow(), driver.CUkernelNodeAttrValue()
    window.base_ptr, window.num_bytes, window.hitRatio = address, size, 1.0
    window.hitProp = window.missProp = driver.CUaccessProperty.CU_ACCESS_PROPERTY_STREAMING
    value.accessPolicyWindow = window
    kind = driver.CUkernelNodeAttrID.CU_LAUNCH_ATTRIBUTE_ACCESS_POLICY_WINDOW
    return int(driver.cuGraphKernelNodeSetAttribute(node, kind, value)[0]) == 0


def _call(function: Any, *arguments: Any) -> Any:
    """What a driver's function returns, and None where it fails or the driver has none: nothing here has to work."""
    try:
        status, *results = function(*arguments)
    except RuntimeError:  # cuda-bindings, of a function that came with a later driver
        return None
    if int(status):
        return None
    return results[0] if len(results) == 1 else tuple(results)
