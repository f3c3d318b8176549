"""Weights that plans take as inputs, in one block of GPU memory."""

import numpy as np

from llmtrt.engine.manifest import WEIGHTS, Engine
from llmtrt.errors import UserError
from llmtrt.runtime.cuda import Cuda, Region
from llmtrt.runtime.kv_cache import aligned


class WeightInputs:
    """Copies the weights of ``engine``'s own file to the GPU; UserError where the file ends before them."""

    def __init__(self, engine: Engine, cuda: Cuda):
        extents, path = engine.weight_inputs, engine.path / WEIGHTS
        size = path.stat().st_size
        for name, (start, length) in extents.items():
            if start + length > size:
                raise UserError(
                    f"{path} ends before the weight {name}: copy the folder again or make it anew with `llmtrt build`"
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
        """Where each lies, by the names of the plans' inputs."""
        return self._places
