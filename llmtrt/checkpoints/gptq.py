"""GPTQ checkpoints (symmetric, 4 bit), whose INT4 blocks pass through bit by bit.

A Linear X of [out N, in K] is stored as AutoGPTQ and GPTQModel write it: X.qweight int32 [K/8, N] (nibble j of word i
is row 8i + j), X.qzeros int32 [groups, N/8], X.scales [groups, N], X.g_idx int32 [K], the group of each input feature.
Value = scale · (nibble − zero). In format "gptq" qzeros holds zero − 1, in "gptq_v2" zero itself; symmetric: zero = 8.
"""

from pathlib import Path

import numpy as np

from llmtrt.checkpoints.checkpoint import Int4Blocks, TensorInfo
from llmtrt.checkpoints.extents import row_range
from llmtrt.checkpoints.safetensors import Extent, SafetensorsCheckpoint, read_values
from llmtrt.errors import UserError

_STORED_ZERO = {"gptq": 0x77, "gptq_v2": 0x88}  # two nibbles of what a symmetric checkpoint has in qzeros
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_UNQUANTIZED = "bring the unquantized checkpoint and let `llmtrt quantize` make INT4 of it"


class GptqCheckpoint(SafetensorsCheckpoint):
    """A ``Checkpoint`` (see there) on a folder whose Linears are GPTQ blocks as ``quantization`` describes."""

    def __init__(self, path: Path, config: dict, quantization: dict):
        self._zero = _check(path, quantization)
        super().__init__(path, config)
        self._linears: dict[str, dict[str, Extent]] = {}
        for name in [name for name in self._extents if name.endswith(".qweight")]:
            module = name.removesuffix(".qweight")
            parts = {part: self._extents.pop(f"{module}.{part}", None) for part in _PARTS}
            if f"{module}.weight" in self._extents:
                raise UserError(f"{path}: {module} has both qweight and weight: download the checkpoint again")
            self._linears[f"{module}.weight"] = parts
            _check_parts(path, module, parts, bool(quantization.get("desc_act")))
        if not self._linears:
            raise UserError(f"{path} calls itself a GPTQ checkpoint but holds no qweight tensor: {_UNQUANTIZED}")

    def tensors(self) -> dict[str, TensorInfo]:
        blocks = {}
        for name, parts in self._linears.items():
            rows, columns = parts["qweight"].shape
            blocks[name] = TensorInfo((columns, rows * 8), "int4")
        return super().tensors() | blocks

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        if name not in self._linears:
            return super().read(name, rows)
        blocks = self.read_blocks(name)
        wanted = row_range(name, blocks.q.shape[::-1], rows)
        columns = slice(wanted.start, wanted.stop)
        scale = np.repeat(blocks.scale[:, columns].astype(np.float32), blocks.group_size, axis=0)
        dense = np.empty((len(wanted), len(blocks.q)), np.float32)
        dense[:, slice(None) if blocks.order is None else blocks.order] = (blocks.q[:, columns] * scale).T
        return dense

    def read_blocks(self, name: str) -> Int4Blocks:
        if name not in self._linears:
            return super().read_blocks(name)
        parts = self._linears[name]
        features, columns = parts["qweight"].shape[0] * 8, parts["qweight"].shape[1]
        groups = parts["scales"].shape[0]
        if not np.all(parts["qzeros"].read() == self._zero):
            raise UserError(f"{self.path}: {name} is asymmetric GPTQ, which no TensorRT reads as INT4: {_UNQUANTIZED}")
        words = parts["qweight"].read().view(np.uint32).reshape(-1, columns)
        q = np.empty((len(words), 8, columns), np.int8)
        for nibble in range(8):
            q[:, nibble] = ((words >> np.uint32(4 * nibble)) & np.uint32(15)).astype(np.int8) - np.int8(8)
        q = q.reshape(features, columns)
        scale = read_values(name, parts["scales"])
        if scale.dtype not in (np.float16, np.float32):
            scale = scale.astype(np.float32)
        order = self._order(name, parts["g_idx"], features, groups)
        return Int4Blocks(q if order is None else q[order], scale, features // groups, order)

    def _order(self, name: str, extent: Extent | None, features: int, groups: int) -> np.ndarray | None:
        """Features sorted by group, None where they are already; stable, so equal files give equal bytes."""
        if extent is None:
            return None
        g_idx = extent.read().view(np.int32)
        straight = np.arange(features) // (features // groups)
        if np.array_equal(g_idx, straight):
            return None
        order = np.argsort(g_idx, kind="stable").astype(np.int64)
        if not np.array_equal(g_idx[order], straight):
            raise UserError(f"{self.path}: {name} has groups of unequal size in g_idx: {_UNQUANTIZED}")
        return order


def _check(path: Path, quantization: dict) -> int:
    """Refuses by reason what is not symmetric 4-bit GPTQ; the byte that its qzeros then consist of."""
    form = quantization.get("checkpoint_format") or "gptq"
    if not isinstance(form, str) or form not in _STORED_ZERO:
        raise UserError(
            f"{path}: GPTQ checkpoint_format {str(form)[:40]!r} is not one of gptq and gptq_v2: {_UNQUANTIZED}"
        )
    if quantization.get("bits") != 4:
        raise UserError(f"{path} is GPTQ with {quantization.get('bits')} bits, and llmtrt reads 4: {_UNQUANTIZED}")
    if quantization.get("sym") is False:
        raise UserError(f"{path} is asymmetric GPTQ (sym: false), which no TensorRT reads as INT4: {_UNQUANTIZED}")
    return _STORED_ZERO[form]


def _check_parts(path: Path, module: str, parts: dict[str, Extent | None], desc_act: bool) -> None:
    """UserError unless the parts are there and their shapes and types fit each other."""
    for part in _PARTS if desc_act else _PARTS[:3]:
        extent = parts[part]
        wanted = ("F16", "BF16", "F32") if part == "scales" else ("I32",)
        axes = 1 if part == "g_idx" else 2
        if extent is None:
            raise UserError(f"{path}: {module} has a qweight but no {part}: download the checkpoint again")
        if len(extent.shape) != axes or extent.dtype not in wanted or 0 in extent.shape:
            found = f"{extent.dtype} {list(extent.shape)}"
            raise UserError(f"{path}: {module}.{part} is {found}, expected {wanted[0]} of {axes} axes: {_UNQUANTIZED}")
    (words, columns), (groups, _) = parts["qweight"].shape, parts["scales"].shape
    features = 8 * words
    if features % groups:
        raise UserError(f"{path}: {module} has {features} inputs in {groups} groups of unequal size: {_UNQUANTIZED}")
    fits = parts["scales"].shape == (groups, columns) and parts["qzeros"].shape == (groups, columns // 8)
    g_idx = parts["g_idx"]
    if not fits or columns % 8 or (g_idx is not None and (g_idx.shape != (features,) or g_idx.dtype != "I32")):
        shapes = ", ".join(f"{part} {list(extent.shape)}" for part, extent in parts.items() if extent is not None)
        raise UserError(f"{path}: the parts of {module} are not those of 4-bit GPTQ ({shapes}): {_UNQUANTIZED}")
