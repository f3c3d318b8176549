"""Integers and scales chosen layer after layer, from what each really sees: the output of the quantized layers before it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llmtrt import files
from llmtrt.checkpoints.checkpoint import Checkpoint
from llmtrt.models.decoder import Decoder
from llmtrt.progress import Report, silent
from llmtrt.quantization.descent import descend
from llmtrt.quantization.gptq import gptq
from llmtrt.quantization.scales import expanded, search_scales
from llmtrt.quantization.solutions import Solution, Solutions
from llmtrt.quantization.statistics import Statistics
from llmtrt.quantization.torch_graph import Values, live
from llmtrt.quantization.torch_model import Layer, LayerwiseModel, Stage, keep

_BATCH_TOKENS = 4096
_STATE = "hidden.npz"


def calibrate(
    checkpoint: Checkpoint,
    decoder: Decoder,
    ids: np.ndarray,
    block_of: Callable[[str, int], int | None],
    dtype: str,
    folder: Path,
    device: str = "cpu",
    report: Report = silent,
) -> Solutions:
    """Quantizes every product of ``decoder``'s layers for which ``block_of(name, K)`` gives a block, on the token
    sequences ``ids`` [n, S], and keeps what it finds in ``folder``.

    A run that was interrupted goes on at the layer that it had reached, if ``folder`` is of the same inputs, and ends in
    the same bytes; if it is of others, it is begun anew. Memory: one layer's weights and Hessians, and the hidden states of
    all tokens, twice.
    """
    return _Calibration(
        LayerwiseModel(checkpoint, decoder, device), block_of, getattr(torch, dtype), Solutions(folder)
    ).run(torch.from_numpy(ids), folder / _STATE, _key(checkpoint, ids, dtype, block_of), report)


def choose_device() -> str:
    """The GPU where torch has one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class _Calibration:
    """Two runs of the model side by side, as the checkpoint has it and as it becomes, one layer at a time."""

    def __init__(
        self,
        model: LayerwiseModel,
        block_of: Callable[[str, int], int | None],
        dtype: torch.dtype,
        solutions: Solutions,
    ):
        self._model, self._block_of, self._dtype, self._solutions = model, block_of, dtype, solutions

    @torch.no_grad()
    def run(self, ids: Tensor, state: Path, key: str, report: Report) -> Solutions:
        layers = self._model.layers
        batches = ids.split(max(1, _BATCH_TOKENS // ids.shape[1]))
        starts = list(map(self._model.start, batches))
        full = [values.pop(layers[0].input) for values in starts]
        quantized, done = full, 0
        if (saved := _read_state(state, key)) is not None:
            done, hidden = saved
            full, quantized = (list(each.to(self._model.device).split(len(batches[0]))) for each in hidden)
        else:
            self._solutions.clear()  # of other inputs
        for index, layer in enumerate(layers[done:], done):
            report(index, len(layers), "calibrating")
            self._model.enter(layer)
            full, quantized, found = self._layer(layer, starts, full, quantized)
            self._solutions.save(index, found)
            _write_state(state, key, index + 1, torch.cat(full), torch.cat(quantized))
        report(len(layers), len(layers))
        return self._solutions

    def _layer(
        self, layer: Layer, shared: list[Values], full: list[Tensor], quantized: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], dict[str, Solution]]:
        """The hidden states after ``layer``, and what its weights became."""
        full = [values | {layer.input: hidden} for values, hidden in zip(shared, full)]
        quantized = [values | {layer.input: hidden} for values, hidden in zip(shared, quantized)]
        found: dict[str, Solution] = {}
        becomes: dict[str, Tensor] = {}
        for place, stage in enumerate(layer.stages):
            later = layer.stages[place + 1 :]
            needed = {layer.output}.union(*(live(each.nodes) | {each.read, each.residual} for each in later))
            needed |= {stage.read, stage.residual}
            for batch in range(len(full)):
                full[batch] = keep(self._model.run(stage.nodes, full[batch]), needed)
                quantized[batch] = keep(self._model.run(stage.nodes, quantized[batch], becomes), needed)
            becomes.clear()
            if stage.weights:
                solved = self._solve(stage, full, quantized)
                found |= solved
                becomes |= {name: self._dense(solution) for name, solution in solved.items()}
        return *([values[layer.output] for values in each] for each in (full, quantized)), found

    def _solve(self, stage: Stage, full: list[Values], quantized: list[Values]) -> dict[str, Solution]:
        k = self._model.weight(stage.weights[0]).shape[1]
        blocks = {name: block for name in stage.weights if (block := self._block_of(name, k)) is not None}
        if not blocks:
            return {}
        statistics = None
        for ours, theirs in zip(full, quantized):
            rows = [each[stage.read].reshape(-1, k) for each in (ours, theirs)]
            if stage.residual:
                rows += [each[stage.residual].flatten(0, 1) for each in (ours, theirs)]
            if statistics is None:
                statistics = Statistics.empty(k, rows[2].shape[1] if stage.residual else None, self._model.device)
            statistics.add(*rows)
        return {name: self._one(self._model.weight(name), statistics, block) for name, block in blocks.items()}

    def _one(self, weight: Tensor, statistics: Statistics, block: int) -> Solution:
        hessian, target = statistics.hessian, statistics.compensated(weight)
        scale = search_scales(target, hessian.diagonal(), block, self._dtype)
        q, scale = descend(target, hessian, gptq(target, hessian, scale, block), scale, block, self._dtype)
        error = weight - q * expanded(scale, block)
        wrong, whole = (float((each @ hessian * each).sum()) for each in (error, weight))
        return Solution(
            q.to(torch.int8).cpu().numpy(), scale.cpu().numpy(), max(0.0, wrong / whole) ** 0.5 if whole > 0 else 0.0
        )

    def _dense(self, solution: Solution) -> Tensor:
        q, scale = (torch.from_numpy(each).to(self._model.device) for each in (solution.q, solution.scale))
        return q * expanded(scale, q.shape[1] // scale.shape[1])


def _key(checkpoint: Checkpoint, ids: np.ndarray, dtype: str, block_of: Callable[[str, int], int | None]) -> str:
    """A digest of all that decides what is found."""
    blocks = {
        name: block_of(name, info.shape[1]) for name, info in checkpoint.tensors().items() if len(info.shape) == 2
    }
    said = [checkpoint.digest(), hashlib.sha256(ids.tobytes()).hexdigest(), ids.shape, dtype, blocks, torch.__version__]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _read_state(path: Path, key: str) -> tuple[int, tuple[Tensor, Tensor]] | None:
    """Layers that are done, and the hidden states after them; None where there is no state of these inputs."""
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as content:
        if str(content["key"]) != key:
            return None
        return int(content["done"]), (torch.from_numpy(content["full"]), torch.from_numpy(content["quantized"]))


def _write_state(path: Path, key: str, done: int, full: Tensor, quantized: Tensor) -> None:
    with files.staged_file(path) as staging, staging.open("wb") as file:
        np.savez(file, key=key, done=done, full=full.cpu().numpy(), quantized=quantized.cpu().numpy())
