"""Readers of what a user has: a Hugging Face folder (safetensors, GPTQ) or a GGUF file."""

import re
from pathlib import Path

from llmtrt import files
from llmtrt.checkpoints.checkpoint import Checkpoint
from llmtrt.errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint in a Hugging Face folder or a GGUF file, opened by reading its headers alone.

    Raises UserError with what to do: the download command for a Hub id, the conversion for pickled weights, the name of
    a quantization or architecture that is not read, the file that is missing, truncated or corrupt.
    """
    text, path = str(path), Path(path).expanduser()
    if path.is_dir():
        return _open_folder(path)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            from llmtrt.checkpoints.gguf import GgufCheckpoint

            return GgufCheckpoint(path)
        raise UserError(f"{path} is neither a folder nor a .gguf file: give the folder that holds its config.json")
    if _HUB_ID.fullmatch(text):
        name = text.split("/")[1]
        raise UserError(
            f"{text} is not a folder here: if it is a Hub id, download it with "
            f"`hf download {text} --local-dir {name}` and give {name} instead"
        )
    raise UserError(f"{path} does not exist: expected a Hugging Face folder or a .gguf file")


def _open_folder(path: Path) -> Checkpoint:
    from llmtrt.checkpoints.gptq import GptqCheckpoint
    from llmtrt.checkpoints.safetensors import CONFIG, SafetensorsCheckpoint

    if not (path / CONFIG).is_file():
        if ggufs := sorted(path.glob("*.gguf")):
            raise UserError(f"{path} is a folder of GGUF files: name one of them, such as {ggufs[0]}")
        if (path / "adapter_config.json").is_file():
            raise UserError(f"{path} holds an adapter only: merge it into its base model and give the merged folder")
        raise UserError(f"{path / CONFIG} is missing: expected a Hugging Face checkpoint's folder or a .gguf file")
    config = files.read_json(path / CONFIG)
    quantization = config.pop("quantization_config", None) or config.pop("compression_config", None)
    beside = path / "quantize_config.json"  # where AutoGPTQ wrote it at first
    if quantization is None and beside.is_file():
        quantization = {"quant_method": "gptq"} | files.read_json(beside)
    if quantization is None:
        return SafetensorsCheckpoint(path, config)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method != "gptq":
        raise UserError(
            f"{path} is quantized by {method or 'a method without a name'}, which llmtrt does not read: "
            "bring the unquantized checkpoint and let `llmtrt quantize` make INT4 of it"
        )
    return GptqCheckpoint(path, config, quantization)
