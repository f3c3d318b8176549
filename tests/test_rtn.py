"""Round to nearest and the packing of its integers, against float64 and ml_dtypes."""

import ml_dtypes
import numpy as np
import pytest

from llmtrt.quantization.packing import pack_int4, pack_table
from llmtrt.quantization.rtn import choose_block, round_to_nearest


@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("largest", [7, 127])
def test_every_weight_is_within_half_a_step(block, largest):
    rng = np.random.default_rng(block)
    weight = (rng.standard_normal((24, 256)) * rng.lognormal(0, 2, (24, 1))).astype(np.float32)
    q, scale = round_to_nearest(weight, block, np.float16, largest)
    assert q.dtype == np.int8 and scale.dtype == np.float16 and scale.shape == (24, 256 // block)
    assert np.abs(q).max() == largest
    wide = np.repeat(scale.astype(np.float64), block, axis=1)
    inside = np.abs(weight) <= largest * wide  # fp16 may round a scale down: then its peak is clipped
    error = np.abs(q * wide - weight)
    assert (error[inside] <= wide[inside] * 0.50001).all()
    assert (error <= wide * (0.5 + largest * 2**-10)).all()
    best = np.clip(np.rint(weight.astype(np.float64) / wide), -largest, largest)
    assert (q != best).mean() < 1e-3  # ties aside, the float64 choice


def test_zero_blocks_and_tiny_blocks_stay_finite():
    weight = np.zeros((2, 64), np.float32)
    weight[1, :32] = 1e-9  # its scale underflows fp16
    q, scale = round_to_nearest(weight, 32, np.float16)
    assert not q.any() and (scale == 1).all()


@pytest.mark.parametrize("shape", [(4, 6), (3, 5), (1, 1)])
def test_int4_packing_is_what_onnx_stores(shape):
    import onnx_ir as ir

    q = np.random.default_rng(0).integers(-8, 8, shape).astype(np.int8)
    packed = pack_int4(q)
    assert packed.tobytes() == ir.tensor(q.astype(ml_dtypes.int4)).tobytes()


@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (4, 7)])
def test_tables_unpack_by_mod_and_exact_division(bits, largest):
    q = np.random.default_rng(1).integers(-largest, largest + 1, (5, 64)).astype(np.int8)
    q[0], q[1], q[2] = largest, -largest, -largest - 1  # the ends of int32
    words = pack_table(q, bits)
    assert words.dtype == np.int32 and words.shape == (5, 64 * bits // 32)
    words = words.astype(object)  # Python's integers: nothing wraps
    powers = [1 << bits * j for j in range(32 // bits)]
    for power in powers:
        rest = words - words % power
        assert -(1 << 31) <= min(rest.flat) and max(rest.flat) < 1 << 31  # what the graph computes in INT32
    digits = [(words - words % power) // power % (1 << bits) - (1 << bits - 1) for power in powers]
    assert (np.stack(digits, axis=-1).reshape(q.shape) == q).all()


@pytest.mark.parametrize(
    ("k", "wanted", "block"),
    [(576, 128, 64), (576, 64, 64), (1536, 128, 128), (96, 128, 32), (48, 64, 16), (172, 128, None), (40, 32, None)],
)
def test_the_block_is_halved_until_it_divides_k(k, wanted, block):
    assert choose_block(k, wanted) == block
