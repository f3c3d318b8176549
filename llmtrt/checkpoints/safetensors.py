"""Hugging Face folders with safetensors weights: config.json, one file or a sharded index, tokenizer files.

The file format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, the tensors without
overlap or gap). Read by hand because the library maps whole files, whose pages then count as this process's memory.
"""

import hashlib
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from llmtrt import files
from llmtrt.checkpoints import tokenizer_files
from llmtrt.checkpoints.checkpoint import Int4Blocks, TensorInfo
from llmtrt.checkpoints.extents import read_extent, row_range
from llmtrt.errors import UserError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_HEADER_LIMIT = 100_000_000  # the format's own

_READABLE = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Extent:
    """Where a tensor lies: ``size`` bytes at ``offset`` of ``path``."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int

    def read(self) -> np.ndarray:
        """All its bytes, uint8 [size]."""
        return read_extent(self.path, self.offset, self.size)


def read_header(path: Path) -> dict[str, Extent]:
    """Every tensor of one safetensors file, its extent checked against the file's; UserError says what is wrong."""
    try:
        total = path.stat().st_size
    except OSError:
        raise UserError(f"{path} is missing: download the checkpoint again") from None
    if total < 8:
        raise UserError(f"{path} is truncated: {total} bytes are no safetensors file: download it again")
    length = int.from_bytes(read_extent(path, 0, 8).tobytes(), "little")
    if length > _HEADER_LIMIT:
        raise UserError(f"{path} is not a safetensors file: its header would have {length} bytes: download it again")
    if 8 + length > total:
        raise UserError(f"{path} is truncated: its header has {length} bytes, the file {total}: download it again")
    try:
        header = json.loads(read_extent(path, 8, length).tobytes())
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise UserError(f"{path} is corrupt: its header is not a JSON object: download it again")
    header.pop("__metadata__", None)
    extents = {name: _extent(path, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, extent in sorted(extents.items(), key=lambda item: (item[1].offset, item[1].size)):
        if extent.offset != end:
            found = f"tensor {name} starts at byte {extent.offset} where {end} is free"
            raise UserError(f"{path} is corrupt: {found}: download it again")
        end += extent.size
        if end > total:
            found = f"tensor {name} ends at byte {end}, the file at {total}"
            raise UserError(f"{path} is truncated: {found}: download it again")
    if end != total:
        raise UserError(f"{path} is corrupt: its tensors end at byte {end}, the file at {total}: download it again")
    return extents


def _extent(path: Path, name: str, entry: object, start: int) -> Extent:
    def natural(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BYTES:
        raise UserError(f"{path}: tensor {name} has the unknown dtype {dtype!r}: bring F32, F16 or BF16 weights")
    if not isinstance(shape, list) or len(shape) > 8 or not all(map(natural, shape)):
        raise UserError(f"{path} is corrupt: tensor {name} has shape {shape!r}: download it again")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(natural, offsets)):
        raise UserError(f"{path} is corrupt: tensor {name} has data_offsets {offsets!r}: download it again")
    size = math.prod(shape) * _BYTES[dtype]
    if offsets[1] - offsets[0] != size:
        raise UserError(
            f"{path} is corrupt: tensor {name} of shape {shape} in {dtype} should have {size} bytes, "
            f"but has {offsets[1] - offsets[0]}: download it again"
        )
    return Extent(path, dtype, tuple(shape), start + offsets[0], size)


def read_values(name: str, extent: Extent, rows: slice | None = None) -> np.ndarray:
    """The tensor's values, or those rows of them, in its own dtype; UserError unless that is F32, F16 or BF16."""
    if extent.dtype not in _READABLE:
        raise UserError(f"{extent.path}: tensor {name} is in {extent.dtype}: expected F32, F16 or BF16 weights")
    dtype, shape, offset, size = _READABLE[extent.dtype], extent.shape, extent.offset, extent.size
    if rows is not None:
        wanted = row_range(name, shape, rows)
        row = math.prod(shape[1:]) * dtype.itemsize
        shape, offset, size = (len(wanted), *shape[1:]), offset + wanted.start * row, len(wanted) * row
    return read_extent(extent.path, offset, size).view(dtype).reshape(shape)


def find_extents(folder: Path) -> tuple[dict[str, Extent], list[Path]]:
    """Every tensor of a folder by name, and the files that say so: model.safetensors, the index with its shards, or the
    only safetensors file there is (as older GPTQ checkpoints have it)."""
    single, index = folder / _SINGLE, folder / _INDEX
    if not single.is_file() and index.is_file():
        return _indexed_extents(folder, index)
    if not single.is_file():
        others = sorted(folder.glob("*.safetensors"))
        if len(others) != 1:
            raise UserError(_no_weights(folder, others))
        single = others[0]
    return read_header(single), [single]


def _indexed_extents(folder: Path, index: Path) -> tuple[dict[str, Extent], list[Path]]:
    weight_map = files.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} is corrupt: 'weight_map' should name a file for every tensor: download it again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise UserError(f"{index} is corrupt: tensor {name} should lie in a file, but the index says {shard!r}")
    shards = {shard: files.child(folder, shard) for shard in sorted(set(weight_map.values()))}
    headers = {}
    for shard, path in shards.items():
        if not path.is_file():
            raise UserError(f"{path} is missing: {index.name} names it: download the checkpoint again")
        headers[shard] = read_header(path)
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise UserError(f"{shards[shard]} lacks tensor {name}, which {index.name} has there: download both again")
    return {name: headers[shard][name] for name, shard in weight_map.items()}, [index, *shards.values()]


def _no_weights(folder: Path, others: list[Path]) -> str:
    if others:
        return f"{folder} holds {len(others)} safetensors files but no {_INDEX}: download the checkpoint again"
    if pickled := sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)):
        return (
            f"{folder} holds {pickled[0]} instead of safetensors, and llmtrt reads no pickle: convert it with "
            f'`python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}')\"`"
        )
    return f"{folder} holds no {_SINGLE}: expected a Hugging Face checkpoint with safetensors weights"


class SafetensorsCheckpoint:
    """A ``Checkpoint`` (see there) on a Hugging Face folder with float weights."""

    def __init__(self, path: Path, config: dict):
        self.path = path
        self.config = config
        generation = path / GENERATION_CONFIG
        self.generation_config = files.read_json(generation) if generation.is_file() else {}
        self._extents, self._files = find_extents(path)

    def tensors(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(extent.shape, extent.dtype) for name, extent in self._extents.items()}

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        return read_values(name, self._extents[name], rows)

    def read_blocks(self, name: str) -> Int4Blocks:
        raise ValueError(f"{name} is stored in {self._extents[name].dtype}, not as INT4 blocks")

    def write_tokenizer(self, folder: Path) -> None:
        tokenizer_files.copy_tokenizer(self.path, folder)

    def digest(self) -> str:
        """SHA-256 over the sorted lines ``name sha256`` of the files that a package is made from."""
        side = [self.path / name for name in (CONFIG, GENERATION_CONFIG, *tokenizer_files.READ)]
        used = sorted({*self._files, *(path for path in side if path.is_file())})
        with ThreadPoolExecutor() as pool:
            sums = pool.map(lambda path: files.digest_file(path)["sha256"], used)
            lines = [f"{path.name} {sha256}\n" for path, sha256 in zip(used, sums)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
