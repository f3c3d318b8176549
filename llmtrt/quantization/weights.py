"""Reads a checkpoint's tensors, quantizes them as the recipe says and writes them, one at a time."""

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from llmtrt.checkpoints.checkpoint import Checkpoint
from llmtrt.errors import UserError
from llmtrt.graph.decoder import EMBEDDING
from llmtrt.graph.weights import Int4, Int8, PackedTable, Plain
from llmtrt.quantization.packing import pack_int4, pack_table
from llmtrt.quantization.recipe import Recipe
from llmtrt.quantization.rtn import choose_block, round_to_nearest
from llmtrt.quantization.solutions import Solution
from llmtrt.quantization.weight_file import NUMPY, WeightFile

_ELEMENTS = 1 << 23  # of one chunk of rows: 32 MB in fp32
_BUFFER = "rotary_emb.inv_freq"  # no parameter: older checkpoints carry it


@dataclass
class QuantizationReport:
    """What became of each matrix: ``tensors`` name → {form, block, …}; ``kept`` name → why it was not quantized.

    ``error`` is ‖W − Ŵ‖ / ‖W‖; ``output_error``, of a calibrated matrix, ‖(W − Ŵ) x‖ / ‖W x‖ over the calibration's x.
    """

    tensors: dict[str, dict] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    weights: int = 0
    bits: int = 0

    def add(self, name: str, form: str, shape: tuple[int, int], nbytes: int, **more) -> None:
        self.tensors[name] = {"form": form, "shape": list(shape), **more}
        self.weights += shape[0] * shape[1]
        self.bits += 8 * nbytes

    def to_json(self) -> dict:
        return {
            "tensors": self.tensors,
            "kept": self.kept,
            "weights": self.weights,
            "bits_per_weight": round(self.bits / max(1, self.weights), 3),
        }


class CheckpointWeights:
    """The graph writer's Weights over a checkpoint. Every tensor it reads is checked for its shape and for NaN."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        file: WeightFile,
        tied: bool,
        on_tensor: Callable[[int], None] = lambda done: None,
        solutions: Mapping[str, Solution] = MappingProxyType({}),
        int8: Container[str] = (),
    ):
        self._checkpoint, self._recipe, self._file = checkpoint, recipe, file
        self._infos = checkpoint.tensors()
        self._dtype = NUMPY[recipe.dtype]
        self._tables: dict[str, Plain | PackedTable] = {}
        self._read: set[str] = set()
        self._matched: set[str] = set()  # of the recipe's patterns
        self._vocabulary = {
            name: "keep" if self._excluded(name) else form
            for name, form in ((f"{EMBEDDING}.weight", recipe.embedding), ("lm_head.weight", recipe.lm_head))
        }
        self.head_is_table = tied and set(self._vocabulary.values()) == {"keep"}
        self._tied, self._on_tensor, self._solutions, self._in_int8 = tied, on_tensor, solutions, int8
        self.report = QuantizationReport()

    def linear(self, name: str, k: int, n: int) -> Plain | Int4 | Int8:
        source = f"{EMBEDDING}.weight" if name == "lm_head.weight" and self._tied else name
        self._expect(source, (n, k))
        form, why = self._form(name, k, self._infos[source].dtype)
        if form == "int4" and self._infos[source].dtype == "int4":
            return self._stored_blocks(name, source)
        if form == "int4" and name in self._solutions:
            return self._solved(name)
        if form == "int4":
            return self._int4(name, source, k, n, choose_block(k, self._recipe.group_size))
        if form == "int8":
            return self._int8(name, source, k, n)
        return self._plain(name, source, n, k, why)

    def table(self, name: str, rows: int, columns: int) -> Plain | PackedTable:
        if name not in self._tables:
            self._expect(name, (rows, columns))
            bits = {"keep": 0, "int8": 8, "int4": 4}[self._vocabulary[name]]
            block = {
                0: None,
                8: columns if columns % 4 == 0 else None,
                4: choose_block(columns, self._recipe.group_size),
            }[bits]
            if bits and block is None:
                self.report.kept[name] = f"{columns} columns cannot be packed {32 // bits} to an INT32"
            self._tables[name] = (
                self._packed_table(name, rows, columns, bits, block)
                if block
                else self._plain(name, name, rows, columns, None)
            )
        return self._tables[name]

    def vector(self, name: str, length: int, dtype: ir.DataType, offset: float = 0.0) -> ir.ExternalTensor:
        self._expect(name, (length,))
        values = self._checked(name, self._checkpoint.read(name)).astype(np.float32) + np.float32(offset)
        return self._file.append(name, values if dtype == ir.DataType.FLOAT else self._fit(name, values))

    def finish(self) -> None:
        """Raises UserError if the checkpoint has tensors that the graph has no place for.

        A bias of zeros changes nothing: some GPTQ tools write one for every projection. A pattern of the recipe that
        matches no matrix is refused too.
        """
        if idle := [pattern for pattern in self._recipe.exclude if pattern not in self._matched]:
            raise UserError(f"the recipe excludes {idle[0]!r}, but no matrix of this model has such a name: correct it")
        spare = {"lm_head.weight"} if self._tied else set()
        left = [
            name
            for name in self._infos
            if name not in self._read | spare
            and not name.endswith(_BUFFER)
            and not (name.endswith(".bias") and not self._checkpoint.read(name).any())
        ]
        if left:
            raise UserError(
                f"{self._checkpoint.path}: the tensor {left[0]} (and {len(left) - 1} more) has no place in the "
                "architecture that config.json names: check that config.json belongs to these weights"
            )

    def _form(self, name: str, k: int, stored: str) -> tuple[str, str | None]:
        """The form a matrix takes and, if it stays as it is against the recipe's rule, why."""
        recipe = self._recipe
        if pattern := self._excluded(name):
            return "keep", f"excluded by the recipe's pattern {pattern!r}"
        if stored == "int4":
            return "int4", None
        if name in self._in_int8:
            return "int8", None
        form = self._vocabulary.get(name) or ("keep" if recipe.algorithm == "none" else "int4")
        if form == "int4" and choose_block(k, recipe.group_size) is None:
            return "keep", f"K = {k} is not a multiple of 16, the smallest block that both runtimes take"
        return form, None

    def _excluded(self, name: str) -> str | None:
        """The recipe's pattern for this matrix, or None. The first that matches counts, for all that match."""
        patterns = self._recipe.excluding(name)
        self._matched.update(patterns)
        return patterns[0] if patterns else None

    def _int4(self, name: str, source: str, k: int, n: int, block: int) -> Int4:
        q, scale = np.empty((k, n), np.int8), np.empty((k // block, n), self._dtype)
        error = total = 0.0
        for rows, chunk in self._chunks(source, n, k):
            values = chunk.astype(np.float32)
            small, scales = round_to_nearest(values, block, self._dtype)
            back = small.reshape(*scales.shape, block) * scales.astype(np.float32)[:, :, None]
            error += float(np.square(back.reshape(values.shape) - values).sum(dtype=np.float64))
            total += float(np.square(values).sum(dtype=np.float64))
            q[:, rows], scale[:, rows] = small.T, scales.T
        relative = _significant((error / total) ** 0.5 if total else 0.0)
        return self._blocks(name, q, scale, block, None, {"error": relative})

    def _solved(self, name: str) -> Int4:
        """What calibration chose."""
        found = self._solutions[name]
        k = found.q.shape[1]
        scale = np.ascontiguousarray(found.scale.T.astype(self._dtype))
        how = {"output_error": _significant(found.error)}
        return self._blocks(name, np.ascontiguousarray(found.q.T), scale, k // len(scale), None, how)

    def _stored_blocks(self, name: str, source: str) -> Int4:
        stored = self._checkpoint.read_blocks(source)
        scale = self._fit(name, stored.scale)
        if (scale[stored.scale != 0] == 0).any():
            raise UserError(
                f"{self._checkpoint.path}: {name} has scales below {self._recipe.dtype}: choose a recipe with float32"
            )
        how = "stored in the checkpoint"
        if (scale.astype(np.float32) != stored.scale.astype(np.float32)).any():
            how += f", its scales rounded to {self._recipe.dtype}"
        return self._blocks(name, stored.q, scale, stored.group_size, stored.order, {"as": how})

    def _blocks(
        self, name: str, q: np.ndarray, scale: np.ndarray, block: int, order: np.ndarray | None, how: dict
    ) -> Int4:
        self._require_finite(name, scale)
        packed = self._file.append(name, pack_int4(q), ir.DataType.INT4, q.shape)
        scales = self._file.append(f"{name}_scale", scale)
        self.report.add(name, "int4", q.shape, packed.nbytes + scales.nbytes, block=block, **how)
        return Int4(packed, scales, block, order)

    def _int8(self, name: str, source: str, k: int, n: int) -> Int8:
        q, scale = np.empty((k, n), np.int8), np.empty(n, self._dtype)
        for rows, chunk in self._chunks(source, n, k):
            small, scales = round_to_nearest(chunk.astype(np.float32), k, self._dtype, largest=127)
            q[:, rows], scale[rows] = small.T, scales[:, 0]
        self._require_finite(name, scale)
        packed, scales = self._file.append(name, q), self._file.append(f"{name}_scale", scale)
        self.report.add(name, "int8", q.shape, packed.nbytes + scales.nbytes)
        return Int8(packed, scales)

    def _plain(self, name: str, source: str, n: int, k: int, why: str | None) -> Plain:
        if why:
            self.report.kept[name] = why
        matrix = np.empty((n, k), self._dtype)
        for rows, chunk in self._chunks(source, n, k):
            matrix[rows] = self._fit(name, chunk)
        tensor = self._file.append(name, matrix)
        self.report.add(name, self._recipe.dtype, (n, k), tensor.nbytes)
        return Plain(tensor)

    def _packed_table(self, name: str, rows: int, columns: int, bits: int, block: int) -> PackedTable:
        # An INT8 row has one scale: in fp16 it could be subnormal, and fp32 costs little.
        scale_dtype = np.dtype(np.float32) if bits == 8 else self._dtype
        q = np.empty((rows, columns * bits // 32), np.int32)
        scale = np.empty((rows, columns // block), scale_dtype)
        for part, chunk in self._chunks(name, rows, columns):
            small, scale[part] = round_to_nearest(
                chunk.astype(np.float32), block, scale_dtype, largest=(1 << bits - 1) - 1
            )
            q[part] = pack_table(small, bits)
        self._require_finite(name, scale)
        packed, scales = self._file.append(name, q), self._file.append(f"{name}_scale", scale)
        self.report.add(name, f"int{bits}", (rows, columns), packed.nbytes + scales.nbytes, block=block)
        return PackedTable(packed, scales, bits)

    def _chunks(self, name: str, n: int, k: int) -> Iterator[tuple[slice, np.ndarray]]:
        """The matrix [n, k] in slices of rows, checked for NaN and infinity."""
        step = max(1, _ELEMENTS // k)
        for start in range(0, n, step):
            rows = slice(start, min(n, start + step))
            yield rows, self._checked(name, self._checkpoint.read(name, rows))

    def _expect(self, name: str, shape: tuple[int, ...]) -> None:
        where = self._checkpoint.path
        if name not in self._infos:
            raise UserError(f"{where}: the tensor {name} is missing: config.json asks for it with shape {list(shape)}")
        if (found := tuple(self._infos[name].shape)) != shape:
            raise UserError(
                f"{where}: the tensor {name} has shape {list(found)}, but config.json asks for {list(shape)}: check that "
                "config.json belongs to these weights"
            )
        self._read.add(name)
        self._on_tensor(len(self._read))

    def _checked(self, name: str, values: np.ndarray) -> np.ndarray:
        if not np.isfinite(values).all():
            raise UserError(
                f"{self._checkpoint.path}: the tensor {name} has NaN or infinite values: the checkpoint is damaged, fetch "
                "it again"
            )
        return values

    def _fit(self, name: str, values: np.ndarray) -> np.ndarray:
        """``values`` in the recipe's dtype; UserError where that overflows."""
        with np.errstate(over="ignore"):
            cast = values.astype(self._dtype, copy=False)
        self._require_finite(name, cast)
        return cast

    def _require_finite(self, name: str, values: np.ndarray) -> None:
        if not np.isfinite(values).all():
            raise UserError(
                f"{self._checkpoint.path}: the tensor {name} has values beyond {self._recipe.dtype}: choose a recipe with "
                "dtype bfloat16 or float32"
            )


def _significant(value: float) -> float:
    """Three digits, so that the last bits of a sum, which differ between processors, stay out of the manifest."""
    return float(f"{value:.3g}")
