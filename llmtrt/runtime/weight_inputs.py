"""Weights that plans take as inputs, in one block of GPU memory."""

import numpy as np

from llmtrt.engine.manifest import WEIGHTS, Engine
from llmtrt.errors import UserError
from llmtrt.graph.names import VALUE_ROWS
from llmtrt.runtime.cuda import Cuda, Region
from llmtrt.runtime.kv_cache import aligned
from llmtrt.runtime.tensors import Tensor

# Inputs that a step has of its own.
_STEP = ("input_ids", "positions", "logits_index", "kv_range", "decode_rows", "past_", VALUE_ROWS)


class WeightInputs:
    """Copies the weights of ``engine``'s own file to the GPU, for plans of which ``plans`` are the tensors. UserError where
    the file ends before them, and where they are not those that the plans take."""

    def __init__(self, engine: Engine, plans: list[tuple[Tensor, ...]], cuda: Cuda):
        extents, path = engine.weight_inputs, engine.path / WEIGHTS
        for plan in plans:
            for tensor in plan:
                name = tensor.name
                if not tensor.is_input or name.startswith(_STEP):
                    continue
                if extents.get(name, (0, 0))[1] != tensor.bytes:
                    raise UserError(
                        f"{engine.path}: a plan takes {tensor.bytes} bytes of {name} that the manifest does not have: make "
                        "the engine anew with `llmtrt build`"
                    )
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
