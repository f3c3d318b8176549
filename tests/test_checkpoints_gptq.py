"""GPTQ checkpoints packed here, in plain Python integers, as the format is published; values compared in float64."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from llmtrt.checkpoints import open_checkpoint
from llmtrt.errors import UserError

K, N, GROUP = 64, 24, 16
NAME = "model.layers.0.mlp.up_proj"


def pack(nibbles: np.ndarray, axis: int) -> np.ndarray:
    """Eight neighbours along ``axis`` into one int32, the first in the lowest bits."""
    moved = np.moveaxis(nibbles.astype(object), axis, 0)
    words = [sum(int_row << (4 * j) for j, int_row in enumerate(moved[i : i + 8])) for i in range(0, len(moved), 8)]
    return np.ascontiguousarray(np.moveaxis(np.array(words, dtype=np.int64).astype(np.uint32), 0, axis)).view(np.int32)


def make(folder: Path, form: str, desc_act: bool, zero: int = 8, **quantization) -> np.ndarray:
    """Writes a checkpoint of one Linear and returns the weight [N, K] that it means, float64."""
    random = np.random.default_rng(7)
    nibbles = random.integers(0, 16, (K, N))
    scales = (random.random((K // GROUP, N)) / 16 + 0.001).astype(np.float16)
    g_idx = np.arange(K) // GROUP
    if desc_act:
        g_idx = random.permutation(g_idx)
    zeros = np.full((K // GROUP, N), zero - (form == "gptq"))
    folder.mkdir()
    config = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": desc_act}
    if form != "gptq":
        config["checkpoint_format"] = form
    (folder / "config.json").write_text(json.dumps({"vocab_size": 3, "quantization_config": config | quantization}))
    tensors = {
        f"{NAME}.qweight": pack(nibbles, 0),
        f"{NAME}.qzeros": pack(zeros, 1),
        f"{NAME}.scales": scales,
        f"{NAME}.g_idx": g_idx.astype(np.int32),
        f"{NAME}.bias": random.standard_normal(N).astype(np.float16),
        "model.norm.weight": np.ones(4, np.float16),
    }
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return ((nibbles - zero) * scales.astype(np.float64)[g_idx]).T


def change(folder: Path, **parts) -> None:
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    for part, value in parts.items():
        tensors.pop(f"{NAME}.{part}")
        if value is not None:
            tensors[f"{NAME}.{part}"] = value
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("desc_act", [False, True])
def test_blocks_mean_the_weight(tmp_path, form, desc_act):
    weight = make(tmp_path / "m", form, desc_act)
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.config == {"vocab_size": 3}
    infos = checkpoint.tensors()
    assert infos.keys() == {f"{NAME}.weight", f"{NAME}.bias", "model.norm.weight"}
    assert (infos[f"{NAME}.weight"].shape, infos[f"{NAME}.weight"].dtype) == ((N, K), "int4")
    blocks = checkpoint.read_blocks(f"{NAME}.weight")
    assert (blocks.q.dtype, blocks.q.shape, blocks.scale.dtype, blocks.scale.shape) == (
        np.int8,
        (K, N),
        np.float16,
        (K // GROUP, N),
    )
    assert blocks.q.min() == -8 and blocks.q.max() == 7 and blocks.group_size == GROUP
    assert (blocks.order is not None) == desc_act
    order = np.arange(K) if blocks.order is None else blocks.order
    rows = blocks.q * np.repeat(blocks.scale.astype(np.float64), GROUP, axis=0)
    assert np.array_equal(rows, weight.T[order])
    x = np.random.default_rng(1).standard_normal((5, K))
    assert np.allclose(x[:, order] @ rows, x @ weight.T, rtol=1e-12, atol=1e-12)
    dense = checkpoint.read(f"{NAME}.weight")
    assert dense.dtype == np.float32 and np.array_equal(dense, weight.astype(np.float32))
    assert np.array_equal(checkpoint.read(f"{NAME}.weight", slice(3, 9)), dense[3:9])
    assert checkpoint.read(f"{NAME}.bias").shape == (N,)


def test_order_is_stable_and_without_it_no_g_idx_is_needed(tmp_path):
    make(tmp_path / "m", "gptq", True)
    g_idx = safetensors.numpy.load_file(tmp_path / "m" / "model.safetensors")[f"{NAME}.g_idx"]
    order = open_checkpoint(tmp_path / "m").read_blocks(f"{NAME}.weight").order
    assert order.dtype == np.int64
    for group in range(K // GROUP):
        assert np.array_equal(order[group * GROUP : (group + 1) * GROUP], np.flatnonzero(g_idx == group))
    weight = make(tmp_path / "n", "gptq", False)
    change(tmp_path / "n", g_idx=None)
    assert np.array_equal(open_checkpoint(tmp_path / "n").read(f"{NAME}.weight"), weight.astype(np.float32))


def test_one_group_for_all_inputs(tmp_path):
    make(tmp_path / "m", "gptq", False, group_size=-1)
    scales = np.full((1, N), 0.5, np.float16)
    zeros = np.full((1, N // 8), 0x77777777, np.int32)
    change(tmp_path / "m", scales=scales, qzeros=zeros, g_idx=np.zeros(K, np.int32))
    blocks = open_checkpoint(tmp_path / "m").read_blocks(f"{NAME}.weight")
    assert blocks.group_size == K and blocks.order is None and np.array_equal(blocks.scale, scales)


def test_settings_beside_the_config(tmp_path):
    weight = make(tmp_path / "m", "gptq", False)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    settings = config.pop("quantization_config")
    settings.pop("quant_method")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (tmp_path / "m" / "quantize_config.json").write_text(json.dumps(settings))
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "gptq_model-4bit-16g.safetensors")
    assert np.array_equal(open_checkpoint(tmp_path / "m").read(f"{NAME}.weight"), weight.astype(np.float32))


@pytest.mark.parametrize(
    ("quantization", "said"),
    [({"bits": 8}, "8 bits"), ({"sym": False}, "asymmetric"), ({"checkpoint_format": "marlin"}, "'marlin'")],
)
def test_other_kinds_are_refused(tmp_path, quantization, said):
    make(tmp_path / "m", "gptq", False, **quantization)
    with pytest.raises(UserError, match=said):
        open_checkpoint(tmp_path / "m")


def test_zeros_that_are_not_symmetric_are_refused(tmp_path):
    make(tmp_path / "m", "gptq", False, zero=7)
    with pytest.raises(UserError, match=f"{NAME}.weight is asymmetric"):
        open_checkpoint(tmp_path / "m").read_blocks(f"{NAME}.weight")


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"scales": None}, "no scales"),
        ({"qzeros": None}, "no qzeros"),
        ({"g_idx": None}, "no g_idx"),
        ({"scales": np.ones((K // GROUP, N + 8), np.float16)}, "not those of 4-bit GPTQ"),
        ({"scales": np.ones((5, N), np.float16)}, "groups of unequal size"),
        ({"g_idx": np.zeros(K + 1, np.int32)}, "not those of 4-bit GPTQ"),
        ({"qweight": np.zeros((K // 8, N), np.float32)}, "expected I32"),
    ],
)
def test_parts_that_do_not_fit(tmp_path, parts, said):
    make(tmp_path / "m", "gptq", True)
    change(tmp_path / "m", **parts)
    with pytest.raises(UserError, match=said):
        open_checkpoint(tmp_path / "m")


def test_groups_of_unequal_size(tmp_path):
    make(tmp_path / "m", "gptq", True)
    g_idx = np.arange(K, dtype=np.int32) // GROUP
    g_idx[0] = 1
    change(tmp_path / "m", g_idx=g_idx)
    with pytest.raises(UserError, match="unequal size"):
        open_checkpoint(tmp_path / "m").read_blocks(f"{NAME}.weight")
