"""The weights that plans take as inputs, in one file beside them."""

from pathlib import Path

import numpy as np
import onnx_ir as ir

from llmtrt.engine.manifest import WEIGHT_ALIGNMENT
from llmtrt.graph.lowerings.weight_inputs import weight_of
from llmtrt.progress import Report


def write_weights(model: ir.Model, path: Path, report: Report) -> dict[str, tuple[int, int]]:
    """Writes what the inputs of ``model`` are to be given to the new file ``path``, one tensor in memory at a time; where
    each begins and its bytes, by the inputs' names. {} and no file where no input is a weight."""
    given = {value.name: weight for value in model.graph.inputs if (weight := weight_of(value)) is not None}
    found: dict[str, tuple[int, int]] = {}
    if not given:
        return found
    with path.open("wb") as file:
        for done, (name, tensor) in enumerate(given.items()):
            report(done, len(given), name)
            file.write(b"\0" * (-file.tell() % WEIGHT_ALIGNMENT))
            array = np.ascontiguousarray(tensor.numpy())
            found[name] = file.tell(), array.nbytes
            array.view(np.uint8).reshape(-1).tofile(file)
    return found
