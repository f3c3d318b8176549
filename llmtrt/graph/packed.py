"""Quantized weights in the layout whose one-row product TensorRT compiles into its fastest kernel. INT4, two numbers a byte:

    bytes    INT8 [N, K' / 128, 64]   byte j of a block has w[j] and w[j + 64]: v = 16 · hi + lo + 8, hi = ⌊v / 16⌋
    scale_i  [N, K' / 128 / I, 1]     16 × that of the block, of the i-th of I slices of K; where blocks have 64, that of lo,
                                      and scale_hi_i that of hi

and INT8, one a byte: bytes INT8 [N, K' / 128, 128], scale [N].

K' is K rounded up to whole blocks of 128, with zeros. tools/search_projection.py measured this among other layouts.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

SPAN, HALF = 128, 64
SCALED = 16  # so much larger than its own is a block's scale
_COLUMNS = 2048  # packed at a time, to bound memory
_THREADS = 4


@dataclass(frozen=True)
class Matrix:
    """A matrix of a package: ``q`` INT4 [K, N] and ``scale`` [K / block, N], or INT8 and [N] (``block`` None)."""

    q: ir.TensorProtocol
    scale: ir.TensorProtocol
    block: int | None

    @property
    def k(self) -> int:
        return self.q.shape[0]

    @property
    def n(self) -> int:
        return self.q.shape[1]


def can_pack(matrix: Matrix) -> bool:
    """Whether the layout has room for its scales and pairs of columns."""
    return matrix.block is None or (matrix.block == HALF or matrix.block % SPAN == 0) and matrix.n % 2 == 0


def spans(k: int) -> int:
    """The blocks of 128 of K rows."""
    return -(-k // SPAN)


def slices(k: int) -> int:
    """Into how many slices of K a row's product is split, which one thread adds up before threads add theirs.

    TensorRT gives a row of up to 512 such sums to a warp, and of more to 128 threads, that read 8 bytes at a time: as few
    sums as occupy either. The slices' scales are arrays of their own since it reads slices of one a number at a time.
    """
    for count in (4, 2):
        sums = spans(k) * HALF // 2 // count
        if spans(k) % count == 0 and (256 <= sums <= 512 or sums >= 1024):
            return count
    return 1


def arrays(name: str, matrices: Sequence[Matrix]) -> dict[str, ir.LazyTensor]:
    """The tensors of ``matrices``, which have the same K and block, with their rows N one below the other, by what they are:
    bytes, scale_0, …. Each has ``name`` and that as its name, and is packed when it is asked for."""
    n, count, scales = sum(matrix.n for matrix in matrices), spans(matrices[0].k), matrices[0].scale.dtype

    def lazy(
        kind: str, make: Callable[[Matrix], np.ndarray], dtype: ir.DataType, *shape: int
    ) -> tuple[str, ir.LazyTensor]:
        def stacked() -> ir.TensorProtocol:
            made = list(map(make, matrices))
            return ir.Tensor(made[0] if len(made) == 1 else np.concatenate(made), dtype=dtype)

        return kind, ir.LazyTensor(stacked, dtype=dtype, shape=ir.Shape(shape), name=f"{name}.{kind}")

    if matrices[0].block is None:
        scale = lazy("scale", lambda matrix: matrix.scale.numpy(), scales, n)
        return dict([lazy("bytes", pack_int8, ir.DataType.INT8, n, count, SPAN), scale])
    found = [lazy("bytes", pack_int4, ir.DataType.INT8, n, count, HALF)]
    parts = slices(matrices[0].k)
    for half, kind in enumerate(("scale",) if matrices[0].block >= SPAN else ("scale", "scale_hi")):
        found += [
            lazy(f"{kind}_{part}", partial(pack_scale, half=half, part=part), scales, n, count // parts, 1)
            for part in range(parts)
        ]
    return dict(found)


def pack_int8(matrix: Matrix) -> np.ndarray:
    """INT8 [N, K' / 128, 128] of ``matrix``."""
    found = np.zeros((matrix.n, spans(matrix.k) * SPAN), np.int8)
    found[:, : matrix.k] = matrix.q.numpy().T
    return found.reshape(matrix.n, -1, SPAN)


def pack_int4(matrix: Matrix) -> np.ndarray:
    """INT8 [N, K' / 128, 64] of ``matrix``."""
    k, n = matrix.k, matrix.n
    pairs = np.frombuffer(matrix.q.tobytes(), np.uint8).reshape(k, n // 2)
    found = np.empty((n, spans(k), HALF), np.uint8)

    def pack(start: int) -> None:
        part = np.zeros((spans(k) * SPAN, min(_COLUMNS, n // 2 - start)), np.uint8)
        part[:k] = pairs[:, start : start + _COLUMNS] ^ 0x88  # each half plus 8
        blocks = part.reshape(spans(k), 2, HALF, -1)
        if k % SPAN:
            part[k:] = 0x88
        lo, hi = blocks[:, 0], blocks[:, 1]
        # 16 · hi + lo + 8 as a signed byte: the upper half without, the lower one with 8 added
        columns = np.stack([(hi << 4) | (lo & 15), (hi & 0xF0) | (lo >> 4)], -1) ^ 0x80
        columns = columns.reshape(spans(k), HALF, -1)
        found[2 * start : 2 * start + columns.shape[2]] = columns.transpose(2, 0, 1)

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(pack, range(0, n // 2, _COLUMNS)))
    return found.view(np.int8)


def pack_scale(matrix: Matrix, half: int, part: int) -> np.ndarray:
    """16 × the scales [N, K' / 128 / I, 1] of the lower (0) or upper (1) half of each block of 128, of slice ``part``."""
    scale = matrix.scale.numpy()
    count = spans(matrix.k) // slices(matrix.k)
    at = np.arange(part * count, (part + 1) * count) * SPAN + half * HALF
    rows = np.minimum(at // matrix.block, len(scale) - 1)  # behind the end there are zeros, whatever their scale
    return np.ascontiguousarray(scale[rows].T * scale.dtype.type(SCALED))[..., None]
