"""Execution contexts of a plan: how they are made, where their tensors lie, and how one is run."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from llmtrt.engine.flavor import Flavor
from llmtrt.engine.logger import OUT_OF_MEMORY
from llmtrt.errors import UserError
from llmtrt.runtime.cuda import Cuda, Region, no_room
from llmtrt.runtime.kernel_cache import KernelCache
from llmtrt.runtime.tensors import Tensor

Shapes = Mapping[str, tuple[int, ...]]

# Who allocates a context's activations, and how much: the session, what its shapes need, one block for all; TensorRT,
# what the profile's largest shapes need; TensorRT, what the largest profile's do.
ALLOCATIONS = {"user": "USER_MANAGED", "profile": "ON_PROFILE_CHANGE", "static": "STATIC"}


@dataclass(frozen=True)
class Settings:
    """``allocation``: a key of ``ALLOCATIONS``. ``specialization``: LAZY, EAGER or NONE, of a flavor that has them."""

    allocation: str = "user"
    specialization: str | None = None

    def __post_init__(self) -> None:
        if self.allocation not in ALLOCATIONS:
            raise UserError(f"allocation should be {', '.join(ALLOCATIONS)}, but is {self.allocation!r}")

    def check(self, flavor: Flavor) -> None:
        """UserError where ``flavor`` does not have what is asked for."""
        if self.specialization is None:
            return
        if not flavor.can("kernel_specialization"):
            raise UserError(f"TensorRT {flavor.name} {flavor.version} has no kernel specialization: leave it out")
        kinds = flavor.module.DynamicShapesKernelSpecializationStrategy.__members__
        if self.specialization not in kinds:
            raise UserError(f"kernel_specialization should be {', '.join(kinds)}, but is {self.specialization!r}")


class Context:
    """One IExecutionContext of ``engine``, whose tensors are ``tensors``, in one optimization ``profile``; ``state`` is the
    caller's note of what it is prepared for, ``shapes`` the inputs' shapes as they are set."""

    def __init__(
        self,
        flavor: Flavor,
        engine: Any,
        tensors: tuple[Tensor, ...],
        profile: int,
        settings: Settings,
        kernels: KernelCache,
        cuda: Cuda,
        logger: Any,
    ):
        self._cuda, self._logger = cuda, logger
        self._user_managed = settings.allocation == "user"
        self._context = _make(flavor, engine, settings, kernels)
        if self._context is None or not self._context.set_optimization_profile_async(profile, cuda.stream):
            raise UserError(f"TensorRT cannot make an execution context: {logger.reason() or 'it gave no reason'}")
        cuda.synchronize()
        self.profile = profile
        self.state: object = None
        self.shapes: Shapes | None = None
        self._needed = 0
        self.inputs = tuple(tensor for tensor in tensors if tensor.is_input)
        self._tensors, self._bound = tensors, {}

    def set_shapes(self, shapes: Shapes) -> int:
        """Sets the inputs' shapes and returns the bytes of activation memory that ``bind`` has to be given for them."""
        if shapes == self.shapes:
            return self._needed
        self.state = self.shapes = None
        self._logger.clear()
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise RuntimeError(f"TensorRT refuses the shape {shape} for {name}: {self._logger.reason()}")
        self._needed = self._context.update_device_memory_size_for_shapes() if self._user_managed else 0
        self.shapes = shapes
        return self._needed

    def bind(self, places: Mapping[str, Region], activations: Region) -> None:
        """Tells the context where each of its tensors lies, and its activations.

        Raises RuntimeError if a tensor is larger than its region, and if an output would share memory with an input:
        TensorRT may write an output before later layers have read the input. Only what the plan itself declares to be
        one buffer, the KV cache, may be, and be seen by value_rows_i, which a plan reads behind its own write.
        """
        context, moved = self._context, []
        self.state = None  # where this ends early, it is prepared for nothing
        self._logger.clear()
        for tensor in self._tensors:
            region, size = places[tensor.name], tensor.bytes
            if size is None:
                size = prod(tuple(context.get_tensor_shape(tensor.name))) * tensor.itemsize
            if size > region.size:
                shape = tuple(context.get_tensor_shape(tensor.name))
                raise RuntimeError(f"{tensor.name} {shape} does not fit its {region.size} bytes")
            if self._bound.get(tensor.name) != region:
                moved.append(tensor.name)
        if moved:
            self._require_apart(places)
        for name in moved:
            self._bound.pop(name, None)
            if not context.set_tensor_address(name, places[name].address):
                raise RuntimeError(
                    f"TensorRT refuses the memory for {name}: {self._logger.reason() or 'it gave no reason'}"
                )
            self._bound[name] = places[name]
        if self._user_managed:
            self._logger.clear()
            context.set_device_memory(activations.address, activations.size)
            if activations.size < self._needed or self._logger.reason():  # it returns nothing
                raise RuntimeError(
                    f"{activations.size} bytes for activations, where TensorRT asked for {self._needed}, are refused: "
                    f"{self._logger.reason() or 'too few'}"
                )

    def _require_apart(self, places: Mapping[str, Region]) -> None:
        starts = np.array([places[tensor.name].address for tensor in self.inputs])
        ends = starts + np.array([places[tensor.name].size for tensor in self.inputs])
        for tensor in self._tensors:
            if tensor.is_input:
                continue
            region = places[tensor.name]
            for index in np.flatnonzero((starts < region.address + region.size) & (ends > region.address)):
                taken = self.inputs[index]
                if tensor.alias is None or tensor.alias not in (taken.name, taken.alias):
                    raise RuntimeError(f"the output {tensor.name} would overwrite the input {taken.name}")

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of an output for the inputs' shapes as they are set."""
        return tuple(self._context.get_tensor_shape(name))

    def run(self) -> None:
        """Puts one execution on the stream (enqueueV3). Raises UserError where the GPU's memory does not suffice."""
        self._logger.clear()
        if not self._context.execute_async_v3(self._cuda.stream):
            reason = self._logger.reason()
            if OUT_OF_MEMORY in reason:
                raise no_room("what a step needs beside what was taken", reason)
            raise RuntimeError(f"TensorRT could not run a step: {reason or 'it gave no reason'}")


def _make(flavor: Flavor, engine: Any, settings: Settings, kernels: KernelCache) -> Any:
    trt = flavor.module
    strategy = getattr(trt.ExecutionContextAllocationStrategy, ALLOCATIONS[settings.allocation])
    if not flavor.can("runtime_config"):
        return engine.create_execution_context(strategy)
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(strategy)
    if settings.specialization:
        kinds = trt.DynamicShapesKernelSpecializationStrategy.__members__
        config.dynamic_shapes_kernel_specialization_strategy = kinds[settings.specialization]
    if flavor.can("cuda_graphs"):
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # the session captures, two contexts in one graph
    kernels.attach(config)
    return engine.create_execution_context(config)
