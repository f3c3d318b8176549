"""GGUF files, read through the ``gguf`` library: llama.cpp's conversions undone, Q4_0 kept as INT4 blocks.

llama.cpp interleaves the rows of q and k for its own RoPE (Llama only) and adds 1 to Gemma's norms; here both are as
Hugging Face has them. Tensors are read with seek and read, never mapped, so that reading does not grow this process.
"""

import math
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Type

from llmtrt import files
from llmtrt.checkpoints.checkpoint import Int4Blocks, TensorInfo
from llmtrt.checkpoints.extents import read_extent, row_range
from llmtrt.checkpoints.gguf_config import config_of, generation_config_of
from llmtrt.checkpoints.gguf_file import GgufTensor, read_gguf_header
from llmtrt.checkpoints.gguf_names import huggingface_names
from llmtrt.checkpoints.gguf_tokenizer import write_gguf_tokenizer
from llmtrt.errors import UserError

_DIRECT = {Type.F32: np.float32, Type.F16: np.float16, Type.BF16: ml_dtypes.bfloat16}
_CHUNK_VALUES = 4 << 20  # dequantized at a time: 16 MiB of float32
_GROUP = 32  # Q4_0's


class GgufCheckpoint:
    """A ``Checkpoint`` (see there) on a GGUF file; quantized types but Q4_0 Linears are read as float32."""

    def __init__(self, path: Path):
        self.path = path
        header = read_gguf_header(path)
        self._metadata, self._stored = header.metadata, header.tensors
        self.config = config_of(path, header, lambda name: self._rows(name, range(self._stored[name].shape[0])))
        self.generation_config = generation_config_of(header.metadata)
        architecture = header.metadata["general.architecture"]
        self._names = huggingface_names(path, architecture, header.tensors)
        self._permuted = architecture == "llama"
        self._norm_offset = architecture == "gemma3"
        for name, stored in self._names.items():
            kind, shape = self._tensor(name).type, self._tensor(name).shape
            if not _readable(kind) or not shape or 0 in shape:
                found = f"{kind.name} {list(shape)}"
                raise UserError(f"{path}: tensor {stored} is {found}, which llmtrt cannot read: bring another file")
            if (heads := self._heads(name)) and shape[0] % (2 * heads):
                raise UserError(f"{path}: tensor {stored} has {shape[0]} rows, which {heads} heads cannot share")

    def tensors(self) -> dict[str, TensorInfo]:
        return {
            name: TensorInfo(self._tensor(name).shape, "int4" if self._is_int4(name) else self._tensor(name).type.name)
            for name in self._names
        }

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        shape = self._tensor(name).shape
        wanted = row_range(name, shape, rows)
        if heads := self._heads(name):
            stored = _stored_rows(shape[0], heads)[wanted.start : wanted.stop]
            first, last = (int(stored.min()), int(stored.max()) + 1) if len(stored) else (0, 0)
            return self._rows(self._names[name], range(first, last))[stored - first]
        values = self._rows(self._names[name], wanted)
        return values - np.float32(1) if self._norm_offset and name.endswith("norm.weight") else values

    def read_blocks(self, name: str) -> Int4Blocks:
        """Q4_0: per 32 inputs a float16 scale and 16 bytes, low nibbles first, each nibble 8 above its value."""
        if not self._is_int4(name):
            raise ValueError(f"{name} is stored in {self._tensor(name).type.name}, not as INT4 blocks")
        columns, features = self._tensor(name).shape
        groups = features // _GROUP
        q, scale = np.empty((features, columns), np.int8), np.empty((groups, columns), np.float16)
        heads = self._heads(name)
        place = np.argsort(_stored_rows(columns, heads)) if heads else np.arange(columns)
        step = max(1, _CHUNK_VALUES // features)
        for start in range(0, columns, step):
            to = place[start : start + step]
            raw = self._bytes(self._names[name], range(start, start + len(to)))
            raw = raw.reshape(len(to), groups, 2 + _GROUP // 2)
            scale[:, to] = np.ascontiguousarray(raw[:, :, :2]).view(np.float16)[:, :, 0].T
            nibbles = np.concatenate([raw[:, :, 2:] & 15, raw[:, :, 2:] >> 4], axis=2).reshape(-1, features)
            q[:, to] = nibbles.T.astype(np.int8) - np.int8(8)
        return Int4Blocks(q, scale, _GROUP)

    def write_tokenizer(self, folder: Path) -> None:
        write_gguf_tokenizer(self.path, self._metadata, folder)

    def digest(self) -> str:
        """SHA-256 of the file."""
        return files.digest_file(self.path)["sha256"]

    def _tensor(self, name: str) -> GgufTensor:
        return self._stored[self._names[name]]

    def _is_int4(self, name: str) -> bool:
        tensor = self._tensor(name)
        return tensor.type == Type.Q4_0 and len(tensor.shape) == 2 and name != "model.embed_tokens.weight"

    def _heads(self, name: str) -> int:
        """How many heads share the interleaved rows of this tensor; 0 where rows lie as in Hugging Face's."""
        if not self._permuted:
            return 0
        field = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        return self.config[field] if field else 0

    def _bytes(self, stored_name: str, rows: range) -> np.ndarray:
        """The bytes of those rows of the file's tensor, uint8 [len(rows), bytes of a row]."""
        tensor = self._stored[stored_name]
        size = tensor.size // tensor.shape[0]
        return read_extent(self.path, tensor.offset + rows.start * size, len(rows) * size).reshape(len(rows), size)

    def _rows(self, stored_name: str, rows: range) -> np.ndarray:
        """Those rows as the file orders them: as they are if float, else dequantized a chunk at a time to float32."""
        tensor = self._stored[stored_name]
        shape = (len(rows), *tensor.shape[1:])
        if tensor.type in _DIRECT:
            return self._bytes(stored_name, rows).reshape(-1).view(_DIRECT[tensor.type]).reshape(shape)
        values = np.empty((len(rows), math.prod(shape[1:])), np.float32)
        step = max(1, _CHUNK_VALUES // max(1, values.shape[1]))
        for start in range(0, len(rows), step):
            chunk = rows[start : start + step]
            values[start : start + step] = gguf.quants.dequantize(self._bytes(stored_name, chunk), tensor.type)
        return values.reshape(shape)


def _stored_rows(count: int, heads: int) -> np.ndarray:
    """Where llama.cpp keeps row i of a q or k of ``count`` rows: within a head it puts i and i + half side by side."""
    return np.arange(count).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _readable(kind: Type) -> bool:
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
