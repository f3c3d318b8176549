"""Which memory a captured graph's kernels are told that they read once, on a driver that has but a graph."""

import ctypes
import sys
import types

import fake_gpu
import pytest
from cuda.bindings import driver as real

from llmtrt.runtime.cuda import Region
from llmtrt.runtime.read_once import mark

MB = 1 << 20
GATE, DOWN, HEAD, CACHE = (
    Region(1 << 30, 60 * MB),
    Region(2 << 30, 30 * MB),
    Region(3 << 30, 500 * MB),
    Region(4 << 30, MB),
)
KERNEL = real.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL
COPY = real.CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMCPY
STREAMING = real.CUaccessProperty.CU_ACCESS_PROPERTY_STREAMING
TYPES = "CUgraph CUgraphNodeType CUaccessPolicyWindow CUkernelNodeAttrValue CUaccessProperty CUkernelNodeAttrID".split()


class Kernel:
    """A node with parameters of the C types of ``values``; ``window`` is what it is told."""

    kern = 0

    def __init__(self, *values: ctypes._SimpleCData | ctypes.Array, kind: int = KERNEL, known: bool = True):
        self.values, self.kind, self.func = values, kind, self if known else 0
        self._table = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        self.kernelParams, self.window = ctypes.addressof(self._table), None

    def __int__(self) -> int:
        return id(self)  # each a function of its own


@pytest.fixture
def driver(monkeypatch):
    def put(*nodes: Kernel, l2: int = 50 * MB) -> None:
        fake = fake_gpu.fake_driver(l2)
        sizes = [[ctypes.sizeof(value) for value in node.values] for node in nodes]
        places = dict(zip(map(id, nodes), sizes))

        def parameter(kernel, index):
            known = kernel and index < len(places[id(kernel)])
            return (0, 0, places[id(kernel)][index]) if known else (1, 0, 0)

        def tell(node, kind, value):
            assert kind == real.CUkernelNodeAttrID.CU_LAUNCH_ATTRIBUTE_ACCESS_POLICY_WINDOW
            of = value.accessPolicyWindow
            node.window = int(of.base_ptr), of.num_bytes, of.hitRatio, of.hitProp, of.missProp
            return (0,)

        for name in TYPES:
            setattr(fake, name, getattr(real, name))
        fake.cuGraphGetNodes = lambda graph, count: (0, list(nodes)[:count], len(nodes))
        fake.cuGraphNodeGetType = lambda node: (0, node.kind)
        fake.cuGraphKernelNodeGetParams = lambda node: (0, node)
        fake.cuFuncGetParamInfo = fake.cuKernelGetParamInfo = parameter
        fake.cuGraphKernelNodeSetAttribute = tell
        bindings = types.ModuleType("cuda.bindings")
        bindings.driver = fake
        for name, module in (("cuda", types.ModuleType("cuda")), ("cuda.bindings", bindings)):
            monkeypatch.setitem(sys.modules, name, module)

    return put


def pointer(region: Region, offset: int = 0) -> ctypes.c_uint64:
    return ctypes.c_uint64(region.address + offset)


def test_a_kernel_streams_the_largest_memory_that_it_is_given(driver):
    activations = ctypes.c_uint64(99)
    product = Kernel(activations, pointer(DOWN), pointer(GATE), ctypes.c_int32(7))
    attention = Kernel((ctypes.c_uint64 * 3)(5, CACHE.address + 512, 6), activations)  # in a structure, from a slot on
    norm, copy = Kernel(activations), Kernel(pointer(GATE), kind=COPY)
    head = Kernel(pointer(HEAD))
    driver(product, attention, norm, copy, head)
    assert mark(1, [GATE, DOWN, HEAD], [CACHE]) == 3
    assert norm.window is copy.window is None
    for kernel, base, size in (
        (product, GATE.address, GATE.size),
        (attention, CACHE.address + 512, CACHE.size - 512),
        (head, HEAD.address, 128 * MB),  # the most that a window may be
    ):
        assert kernel.window == (base, size, 1, STREAMING, STREAMING)


@pytest.mark.parametrize("weights, l2", [([], 0), ([GATE, DOWN], 50 * MB)])
def test_weights_that_stay_in_the_cache_are_left_alone(driver, weights, l2):
    product = Kernel(pointer(GATE))
    driver(product, l2=l2)
    assert mark(1, weights, [CACHE]) == 0 and product.window is None


def test_a_driver_that_does_not_tell_parameters_changes_nothing(driver):
    product = Kernel(pointer(HEAD), known=False)
    driver(product)
    assert mark(1, [HEAD], []) == 0 and product.window is None


def test_a_driver_older_than_the_question_changes_nothing(driver):
    def missing(*_):
        raise RuntimeError("Function cuFuncGetParamInfo not found")  # as cuda-bindings has it before CUDA 12.4

    product = Kernel(pointer(HEAD))
    driver(product)
    sys.modules["cuda.bindings"].driver.cuFuncGetParamInfo = missing
    assert mark(1, [HEAD], []) == 0 and product.window is None


def test_memory_beside_what_is_read_once_is_left_alone(driver):
    before, behind = Kernel(ctypes.c_uint64(GATE.address - 1)), Kernel(ctypes.c_uint64(GATE.address + GATE.size))
    within, last = Kernel(pointer(HEAD, HEAD.size - 8)), Kernel(ctypes.c_uint64(CACHE.address + CACHE.size))
    driver(before, behind, within, last)
    assert mark(1, [HEAD, GATE, GATE], [CACHE, CACHE]) == 1
    assert before.window is behind.window is last.window is None and within.window[:2] == (
        HEAD.address + HEAD.size - 8,
        8,
    )
