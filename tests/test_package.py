"""Packages and the files in them: whole or not at all, verified, the same bytes for the same inputs."""

import hashlib
import json
import tracemalloc

import numpy as np
import pytest
from families import save
from safetensors.numpy import save_file

import llmtrt.files as files
from llmtrt.errors import UserError
from llmtrt.package import open_package
from llmtrt.quantization.pipeline import quantize


def test_the_same_inputs_give_the_same_bytes(tmp_path):
    checkpoint = save("gemma3", tmp_path / "checkpoint")
    moved = save("gemma3", tmp_path / "elsewhere" / "other-name")
    first, second = (
        quantize(c, tmp_path / name, "int4-vocab8").package for c, name in ((checkpoint, "a"), (moved, "b"))
    )
    names = sorted(path.name for path in first.path.iterdir())
    assert names == sorted(path.name for path in second.path.iterdir())
    for name in names:
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes(), name
    assert first.digest == second.digest


def test_the_manifest_has_the_digest_of_every_file(tmp_path):
    package = quantize(save("phi3-long", tmp_path / "checkpoint"), tmp_path / "package").package
    listed = package.manifest["files"]
    assert set(listed) == {path.name for path in package.path.iterdir()} - {"manifest.json"}
    for name, digest in listed.items():
        assert hashlib.sha256((package.path / name).read_bytes()).hexdigest() == digest["sha256"]
    assert "long factors" in package.spec.notes[0]
    assert package.manifest["recipe"]["group_size"] == 128


def test_large_files_are_verified_chunk_by_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK_BYTES", 1000)
    path = tmp_path / "weights"
    path.write_bytes(np.random.default_rng(0).bytes(4321))
    digest = files.digest_file(path)
    assert len(digest["chunks"]) == 5 and digest["bytes"] == 4321
    assert digest["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest["chunks"][3] == hashlib.sha256(path.read_bytes()[3000:4000]).hexdigest()
    files.verify_files(tmp_path, {"weights": digest})
    data = bytearray(path.read_bytes())
    data[3500] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"weights is corrupt.*from 3000 on"):
        files.verify_files(tmp_path, {"weights": digest})
    with pytest.raises(UserError, match="chunk digests of weights are not those of a file of 4321 bytes"):
        files.verify_files(tmp_path, {"weights": digest | {"chunks": digest["chunks"][:1]}})


@pytest.mark.parametrize("name", ["../up", "/etc/passwd", "a/b", "a\\b", "", ".", "..", "nul\0", 3, None])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="is not a plain file name"):
        files.child(tmp_path, name)


def test_a_staged_file_replaces_the_old_one_or_leaves_it(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), files.staged_file(target) as staging:
        staging.write_text("half")
        1 / 0  # noqa: B018
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
    with files.staged_file(target) as staging:
        staging.write_text("new")
    assert target.read_text() == "new" and list(tmp_path.iterdir()) == [target]


def test_peak_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    """Python's own allocations, NumPy's among them; tools/measure_memory.py measures a real width from outside."""
    peaks = []
    for layers in (2, 12):
        folder = tmp_path / f"checkpoint-{layers}"
        write_checkpoint(folder, layers)
        tracemalloc.start()
        try:
            quantize(folder, tmp_path / f"package-{layers}", "int4-g32")
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    matrix = 512 * 1024 * 4
    assert peaks[1] < 1.1 * peaks[0] + 200_000  # ten layers are 90 MB in fp32; their nodes and names are small
    assert peaks[1] < 12 * matrix


def write_checkpoint(folder, layers):
    """A Llama of width 512 with random fp32 weights."""
    hidden, wide, vocabulary = 512, 1024, 64
    folder.mkdir()
    config = dict(
        architectures=["LlamaForCausalLM"], hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers
    )
    config |= dict(
        num_attention_heads=8,
        vocab_size=vocabulary,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
    )
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for i in range(layers):
        prefix = f"model.layers.{i}."
        shapes |= {f"{prefix}{n}.weight": (hidden,) for n in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{prefix}self_attn.{n}_proj.weight": (hidden, hidden) for n in "qkvo"}
        shapes |= {f"{prefix}mlp.{n}_proj.weight": (wide, hidden) for n in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, wide)
    rng = np.random.default_rng(0)
    save_file(
        {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}, folder / "model.safetensors"
    )


def test_bf16_shards_give_what_fp32_gives(tmp_path):
    """The values are bf16's to begin with, so nothing but the container differs."""
    import torch
    from safetensors.torch import load_file
    from safetensors.torch import save_file as save_torch

    first = save("llama-mha-untied", tmp_path / "bf16")
    second = save("llama-mha-untied", tmp_path / "fp32")
    tensors = {name: tensor.bfloat16().contiguous() for name, tensor in load_file(first / "model.safetensors").items()}
    names = sorted(tensors)
    shards = {"one.safetensors": names[: len(names) // 2], "two.safetensors": names[len(names) // 2 :]}
    (first / "model.safetensors").unlink()
    for shard, part in shards.items():
        save_torch({name: tensors[name] for name in part}, first / shard)
    where = {name: shard for shard, part in shards.items() for name in part}
    (first / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    save_torch({name: tensor.to(torch.float32) for name, tensor in tensors.items()}, second / "model.safetensors")
    packages = [quantize(folder, tmp_path / f"{folder.name}-package", "int4-g32").package for folder in (first, second)]
    for name in ("model.onnx", "model.onnx.data"):
        assert (packages[0].path / name).read_bytes() == (packages[1].path / name).read_bytes()


@pytest.mark.parametrize(
    ("field", "value"),
    [("layers", 0), ("layers", True), ("max_seq", "8"), ("dtype", "int8"), ("eos_token_ids", [97]), ("notes", "x")],
)
def test_a_manifest_out_of_range_is_named(tmp_path, field, value):
    package = quantize(save("llama-mha-untied", tmp_path / "checkpoint"), tmp_path / "package").package
    manifest = json.loads((package.path / "manifest.json").read_text())
    manifest["model"][field] = value
    (package.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=field):
        open_package(package.path)
