"""From a checkpoint to a package."""

import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import llmtrt.package as packages
from llmtrt import files
from llmtrt.checkpoints import open_checkpoint
from llmtrt.checkpoints.checkpoint import Checkpoint
from llmtrt.errors import UserError
from llmtrt.manifest import write_manifest
from llmtrt.models import decoder_of
from llmtrt.models.decoder import Decoder
from llmtrt.progress import Report, silent
from llmtrt.quantization.recipe import DEFAULT, SELF, Recipe, read_recipe

# What generation_config.json may say that a SamplingParams has a place for.
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")


@dataclass(frozen=True)
class Quantized:
    """``report``: as in the manifest, what became of each matrix."""

    package: packages.Package
    report: dict


def calibration_folder(output: str | Path) -> Path:
    """Where what a calibration has done is kept until the package ``output`` is there."""
    return Path(f"{output}.calibration")


def quantize(
    checkpoint: str | Path,
    output: str | Path,
    recipe: str | Path | Recipe = DEFAULT,
    max_seq: int | None = None,
    ignore_fields: Iterable[str] = (),
    calibration: str | Path = SELF,
    report: Report = silent,
) -> Quantized:
    """Reads a checkpoint (Hugging Face folder or GGUF file) and writes the package ``output``, a new folder.

    ``recipe``: a name, a YAML file or a Recipe. ``max_seq``: the declared capacity in tokens, the model's own if None.
    ``ignore_fields``: fields of config.json that are known to change nothing. ``calibration``: for a recipe that calibrates,
    a text, a .jsonl of chats, or "self" (what the model writes, rounded to nearest). The same inputs give the same bytes on
    one machine. Peak memory is that of the largest tensor or, with calibration, layer, whatever the number of layers.

    Raises UserError, with nothing left behind but, where calibration had begun, ``calibration_folder(output)``: the same
    call goes on from there, and removes it at its end.
    """
    import onnx_ir as ir

    from llmtrt.graph.decoder import write_decoder
    from llmtrt.quantization.weight_file import WeightFile
    from llmtrt.quantization.weights import CheckpointWeights

    if not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe)
    if calibration != SELF and not recipe.calibrates:
        raise UserError(f"the recipe's algorithm {recipe.algorithm} takes no --calibration {calibration}: leave it out")
    files.require_absent(Path(output))
    source = open_checkpoint(checkpoint)
    decoder = decoder_of(source.config, str(source.path), max_seq, ignore_fields)
    spec, generation = _spec(source, decoder, recipe), _generation(source)
    total = len(source.tensors())
    work, found = calibration_folder(output), None
    if recipe.calibrates:
        from llmtrt.quantization.calibration import solve

        def make_rounded(folder: Path) -> packages.Package:
            return quantize(
                checkpoint, folder, replace(recipe, algorithm="rtn", bits=None), max_seq, ignore_fields
            ).package

        found = solve(source, decoder, recipe, calibration, work, make_rounded, report)
    with files.staged_folder(Path(output)) as folder:
        with WeightFile(folder, packages.WEIGHTS) as file:
            chosen = (found.solutions, found.int8) if found else ()
            weights = CheckpointWeights(source, recipe, file, decoder.tied, lambda done: report(done, total), *chosen)
            model = write_decoder(decoder, weights, recipe.dtype)
            weights.finish()
        # Saved without onnx_ir's external-data option: the tensors lie where the model says already.
        ir.save(model, folder / packages.GRAPH)
        source.write_tokenizer(folder)
        origin = {"architecture": source.config["architectures"][0], "sha256": source.digest()}
        write_manifest(
            folder,
            packages.PACKAGE,
            {
                "model": spec.to_json(),
                "generation": generation,
                "source": origin,
                "recipe": recipe.to_json(),
                "quantization": weights.report.to_json(),
            }
            | ({"calibration": found.how} if found else {}),
        )
    if found:
        shutil.rmtree(work, ignore_errors=True)
    report(total, total)
    return Quantized(packages.open_package(output, verify=False), weights.report.to_json())


def _generation(source: Checkpoint) -> dict:
    """The sampling defaults of generation_config.json; UserError for a value that is no finite number."""
    given = {key: source.generation_config[key] for key in _SAMPLING if source.generation_config.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(
                f"{source.path}: {key} of the generation config should be a number, but is {str(value)[:40]}"
            )
    return given


def _spec(source: Checkpoint, decoder: Decoder, recipe: Recipe) -> packages.ModelSpec:
    ends = source.generation_config.get("eos_token_id")
    ends = source.config.get("eos_token_id") if ends is None else ends
    begin = source.config.get("bos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    for token in [*ends, *([] if begin is None else [begin])]:
        if type(token) is not int or not 0 <= token < decoder.vocab_size:
            raise UserError(f"{source.path}: the token id {token!r} is not below vocab_size = {decoder.vocab_size}")
    return packages.ModelSpec(
        family=decoder.family,
        layers=len(decoder.layers),
        kv_heads=decoder.kv_heads,
        head_dim=decoder.head_dim,
        vocab_size=decoder.vocab_size,
        max_seq=decoder.max_seq,
        dtype=recipe.dtype,
        kv_dtype=recipe.dtype,
        bos_token_id=begin,
        eos_token_ids=tuple(ends),
        notes=tuple(rope.note for rope in decoder.ropes if rope.note),
    )
