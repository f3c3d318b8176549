"""A calibrated recipe from a checkpoint to the integers of every layer: text, layers, and what is kept between runs."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from llmtrt import files
from llmtrt.checkpoints.checkpoint import Checkpoint
from llmtrt.errors import UserError
from llmtrt.models.decoder import Decoder
from llmtrt.package import Package
from llmtrt.progress import Report
from llmtrt.quantization.precision import Form, candidates, choose_forms
from llmtrt.quantization.recipe import SELF, Recipe
from llmtrt.quantization.rtn import choose_block
from llmtrt.quantization.solutions import Solutions

_TOKENS, _FORMS = "tokens.npz", "forms.json"
_ROUNDED = "rounded"
_SENSITIVITY_SEQUENCES = 8


@dataclass(frozen=True)
class Found:
    """``int8``: names of the weights that take INT8; ``how``: the manifest's word on what it was found from."""

    solutions: Solutions
    int8: frozenset[str]
    how: dict


def solve(
    source: Checkpoint,
    decoder: Decoder,
    recipe: Recipe,
    calibration: str | Path,
    work: Path,
    make_rounded: Callable[[Path], Package],
    report: Report,
) -> Found:
    """What the weights of every layer become.

    ``work`` keeps what an interrupted run had done; ``make_rounded(folder)`` makes the package that writes the text of
    ``calibration`` "self". Raises UserError without torch, and for a calibration text that is not as it should be.
    """
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"the recipe's algorithm {recipe.algorithm} needs torch, which cannot be imported ({error}): install it with "
            "`pip install torch`, or take a recipe that rounds to nearest"
        ) from None
    from llmtrt.quantization.layerwise import calibrate, choose_device

    infos = source.tensors()

    if recipe.calibration_length > decoder.max_seq:
        raise UserError(
            f"calibration_length is {recipe.calibration_length}, but the model takes {decoder.max_seq} tokens: lower it"
        )
    ids, said = _tokens(source, recipe, calibration, work, make_rounded, report)
    work.mkdir(parents=True, exist_ok=True)  # fails, where it does, before hours of layers
    kept = {name for name, info in infos.items() if info.dtype == "int4" or recipe.excluding(name)}
    forms = None if recipe.bits is None else _forms(source, decoder, recipe, kept, ids, work, report)

    def block_of(name: str, k: int) -> int | None:
        if name in kept:
            return None
        if forms is None:
            return choose_block(k, recipe.group_size)
        return forms[name].block or None if name in forms else None

    solutions = calibrate(source, decoder, ids, block_of, recipe.dtype, work, choose_device(), report)
    int8 = frozenset(name for name, form in (forms or {}).items() if not form.block)
    return Found(solutions, int8, said | {"sequences": len(ids), "length": ids.shape[1]})


def _forms(
    source: Checkpoint, decoder: Decoder, recipe: Recipe, kept: set[str], ids: np.ndarray, work: Path, report: Report
) -> dict[str, Form]:
    """The form of each matrix but ``kept`` that the recipe's average of bits is for; saved in ``work``."""
    import torch

    from llmtrt.quantization.layerwise import choose_device
    from llmtrt.quantization.sensitivity import sensitivities
    from llmtrt.quantization.torch_model import LayerwiseModel

    ids = ids[:_SENSITIVITY_SEQUENCES]
    key = json.dumps([source.digest(), recipe.to_json(), hashlib.sha256(ids.tobytes()).hexdigest()])
    if (work / _FORMS).is_file() and (saved := files.read_json(work / _FORMS)).get("key") == key:
        return {name: Form(block) for name, block in saved["blocks"].items()}
    model, infos = LayerwiseModel(source, decoder, choose_device()), source.tensors()
    names = [name for layer in model.layers for stage in layer.stages for name in stage.weights]
    options = {name: forms for name in names if name not in kept and (forms := candidates(infos[name].shape[1]))}
    losses = sensitivities(model, torch.from_numpy(ids), options, getattr(torch, recipe.dtype), report)
    forms = choose_forms(losses, {name: infos[name].shape for name in losses}, recipe.bits)
    with files.staged_file(work / _FORMS) as staging:
        files.write_json(staging, {"key": key, "blocks": {name: form.block for name, form in forms.items()}})
    return forms


def _tokens(
    source: Checkpoint,
    recipe: Recipe,
    calibration: str | Path,
    work: Path,
    make_rounded: Callable[[Path], Package],
    report: Report,
) -> tuple[np.ndarray, dict]:
    from llmtrt.quantization.calibration_text import read_sequences, sample_sequences
    from llmtrt.runtime.tokenizer import Tokenizer

    sequences, length = recipe.calibration_sequences, recipe.calibration_length
    if calibration != SELF:
        path = Path(calibration)
        if not path.is_file():
            raise UserError(f"--calibration {calibration} is neither self nor a file: give a text or a .jsonl of chats")
        with TemporaryDirectory() as folder:
            source.write_tokenizer(Path(folder))
            ids = read_sequences(path, Tokenizer(Path(folder)), sequences, length)
        return ids, {"text": path.name, "sha256": files.digest_file(path)["sha256"]}
    key = json.dumps([source.digest(), recipe.to_json()])
    if (work / _TOKENS).is_file():
        with np.load(work / _TOKENS, allow_pickle=False) as content:
            if str(content["key"]) == key:
                return content["ids"], {"text": SELF}
    shutil.rmtree(work / _ROUNDED, ignore_errors=True)
    ids = sample_sequences(make_rounded(work / _ROUNDED), sequences, length, report)
    shutil.rmtree(work / _ROUNDED)
    with files.staged_file(work / _TOKENS) as staging, staging.open("wb") as file:
        np.savez(file, key=key, ids=ids)
    return ids, {"text": SELF}
