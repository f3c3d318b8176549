"""The header of a GGUF file as plain values; the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md."""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFEndian, GGUFReader, GGUFValueType

from llmtrt.errors import UserError


@dataclass(frozen=True)
class GgufTensor:
    """``shape`` outermost axis first; its bytes are ``size`` from ``offset`` of the file."""

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class GgufHeader:
    metadata: dict
    tensors: dict[str, GgufTensor]


class _BoundedReader(GGUFReader):
    """GGUFReader that refuses what lies beyond the end of the file, and takes arrays in one go.

    As it is, it reads on over empty arrays, without end where a count is corrupt, and makes a memory map's view of
    every number and string: 11 s and 690 MB for a vocabulary of 262,144 tokens.
    """

    def _get(self, offset, dtype, count=1, override_order=None):
        dtype, count = np.dtype(dtype), int(count)
        order = self.byte_order if override_order is None else override_order
        return np.frombuffer(self.data, dtype.newbyteorder(order), count, int(offset)) if count else np.empty(0, dtype)

    def _get_field_parts(self, orig_offs, raw_type):
        if raw_type == GGUFValueType.ARRAY:
            head = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
            kind, count = GGUFValueType(head[0][0]), int(head[1][0])
            if kind == GGUFValueType.STRING:
                strings, size = self._strings(orig_offs + 12, count)
                return 12 + size, head + strings, list(range(2, 2 + count)), [GGUFValueType.ARRAY, kind]
            if kind in self.gguf_scalar_to_np:
                values = self._get(orig_offs + 12, self.gguf_scalar_to_np[kind], count)
                return 12 + values.nbytes, [*head, values], [2], [GGUFValueType.ARRAY, kind]
        return super()._get_field_parts(orig_offs, raw_type)

    def _strings(self, start: int, count: int) -> tuple[list[memoryview], int]:
        length = struct.Struct(">Q" if self.byte_order == "S" else "<Q")
        data, end, found = memoryview(self.data), start, []
        for _ in range(count):
            first = end + length.size
            end = first + length.unpack_from(data, end)[0]
            if end > len(data):
                raise ValueError(f"a string ends at byte {end}, the file at {len(data)}")
            found.append(data[first:end])
        return found, end - start


def read_gguf_header(path: Path) -> GgufHeader:
    """Metadata and tensors of a GGUF file; nothing stays mapped. Raises UserError naming a file that is corrupt."""
    try:
        reader = _BoundedReader(path)
        if reader.endianess != GGUFEndian.LITTLE:
            raise UserError(f"{path} is a big-endian GGUF file: bring a little-endian one")
        metadata = {name: _value(field) for name, field in reader.fields.items()}
        tensors = {
            tensor.name: GgufTensor(
                tensor.tensor_type, tuple(map(int, tensor.shape[::-1])), int(tensor.data_offset), int(tensor.n_bytes)
            )
            for tensor in reader.tensors
        }
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, IndexError, TypeError, ArithmeticError, RecursionError, struct.error) as error:
        raise UserError(f"{path} is truncated or not a GGUF file ({error}): download it again") from None
    return GgufHeader(metadata, tensors)


def _value(field):
    value = field.contents()
    if field.types[-1] == GGUFValueType.FLOAT32 and field.types[0] == GGUFValueType.FLOAT32:
        return float(str(np.float32(value)))  # 1e-05, as config.json has it, instead of 9.999999747378752e-06
    return value
