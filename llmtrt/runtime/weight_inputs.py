"""Weights that a plan takes as inputs: in one block of GPU memory, as they lie in the package's file."""

import numpy as np

from llmtrt.engine.manifest import Engine
from llmtrt.errors import UserError
from llmtrt.package import WEIGHTS, Package
from llmtrt.runtime.cuda import Cuda, Region
from llmtrt.runtime.kv_cache import aligned


class WeightInputs:
    """Copies the weights of ``package`` that ``engine`` names to the GPU; UserError where the file ends before them."""

    def __init__(self, engine: Engine, package: Package, cuda: Cuda):
        extents, path = engine.weight_inputs, package.path / WEIGHTS
        size = path.stat().st_size
        for name, (start, length) in extents.items():
            if start + length > size:
                raise UserError(
                    f"{path} ends before the weight {name}, which {engine.path} takes from it: make the package anew with "
                    "`llmtrt quantize`, and the engine with `llmtrt build`"
                )
        address = cuda.allocate(sum(aligned(length) for _, length in extents.values()))
        content = np.memmap(path, np.uint8, "r")
        self._places: dict[str, Region] = {}
        for name, (start, length) in extents.items():
            self._places[name] = Region(address, length)
            cuda.upload(address, content[start : start + length])
            address += aligned(length)
        cuda.synchronize()

    def places(self) -> dict[str, Region]:
        """Where each lies, by the names of the plan's inputs."""
        return self._places
