"""transformers with the weights that a package holds: the reference of a quantized graph."""

import copy
from pathlib import Path

import numpy as np
import onnx
import torch
from families import reference
from onnx import numpy_helper


def dequantized(folder: Path) -> dict[str, np.ndarray]:
    """Every matrix of the package as [N, K] float64 by its name in the checkpoint; the table as [V, H]."""
    graph = onnx.load(folder / "model.onnx").graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    matrices = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            name, (q, scale) = node.input[0], (stored[which].astype(np.float64) for which in node.input)
            wide = np.repeat(scale, q.shape[0] // scale.shape[0], axis=0) if scale.ndim == 2 else scale
            matrices[name] = (q * wide).T
        elif node.op_type == "Gemm":
            matrices[node.input[1]] = stored[node.input[1]].astype(np.float64)
    table = stored["model.embed_tokens.weight"]
    if table.dtype == np.int32:
        scale = stored["model.embed_tokens.weight_scale"].astype(np.float64)
        q = unpacked(table, 8 if scale.shape[1] == 1 else 4)
        table = q * np.repeat(scale, q.shape[1] // scale.shape[1], axis=1)
    return matrices | {"model.embed_tokens.weight": table}


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [V, C] → the 32 / bits values of each, int64 [V, C · 32 / bits]: its digits less half the base."""
    half = 1 << bits - 1
    values = [(words.view(np.uint32).astype(np.int64) >> bits * i & 2 * half - 1) - half for i in range(32 // bits)]
    return np.stack(values, axis=-1).reshape(len(words), -1)


def rounded_model(name: str, folder: Path) -> torch.nn.Module:
    """reference(name) with its matrices replaced by the package's; a tied head is untied where it has its own."""
    model, matrices = copy.deepcopy(reference(name)), dequantized(folder)
    if "lm_head.weight" in matrices:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.from_numpy(matrices.pop(parameter_name).astype(np.float32)))
    assert not matrices
    return model
