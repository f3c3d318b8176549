"""Safetensors folders against the safetensors library itself, and every way in which such a folder can be broken."""

import json
import shutil
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from llmtrt.checkpoints import open_checkpoint
from llmtrt.errors import UserError

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def random_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = {
        "model.embed_tokens.weight": (33, 8),
        "model.layers.0.mlp.up_proj.weight": (12, 8),
        "model.norm.weight": (8,),
    }
    return {
        f"{kind}.{name}": random.standard_normal(shape).astype(dtype)
        for kind, dtype in DTYPES.items()
        for name, shape in shapes.items()
    }


def write(folder: Path, shards: list[dict[str, np.ndarray]], config: dict | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"architectures": ["LlamaForCausalLM"]}))
    if len(shards) == 1:
        safetensors.numpy.save_file(shards[0], folder / "model.safetensors")
        return folder
    weight_map = {}
    for index, tensors in enumerate(shards):
        name = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        safetensors.numpy.save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def sharded(folder: Path) -> Path:
    tensors = list(random_tensors().items())
    return write(folder, [dict(tensors[:4]), dict(tensors[4:])])


def rewrite_header(file: Path, change) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    new = json.dumps(header).encode()
    file.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])


def message(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_checkpoint(path)
    text = str(caught.value)
    assert "\n" not in text and "Traceback" not in text
    return text


@pytest.mark.parametrize("parts", [1, 2])
def test_values_are_those_that_the_library_wrote(tmp_path, parts):
    folder = write(tmp_path / "m", [random_tensors()]) if parts == 1 else sharded(tmp_path / "m")
    checkpoint, wanted = open_checkpoint(folder), random_tensors()
    assert checkpoint.tensors().keys() == wanted.keys()
    for name, values in wanted.items():
        info = checkpoint.tensors()[name]
        assert (info.shape, info.dtype) == (values.shape, name.split(".")[0])
        read = checkpoint.read(name)
        assert read.dtype == values.dtype and read.tobytes() == values.tobytes()
        assert checkpoint.read(name, slice(3, 7)).tobytes() == values[3:7].tobytes()
        assert checkpoint.read(name, slice(5, None)).tobytes() == values[5:].tobytes()
        assert checkpoint.read(name, slice(0, 0)).shape == (0, *values.shape[1:])


def test_memory_is_given_back(tmp_path):
    tensors = {f"model.layers.{index}.w": np.full((512, 1024), index, np.float32) for index in range(12)}
    checkpoint = open_checkpoint(write(tmp_path / "m", [tensors]))
    tracemalloc.start()
    for name, values in tensors.items():
        assert np.array_equal(checkpoint.read(name), values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 2 << 20 <= peak < 5 << 20  # one tensor of 2 MiB, and one more until its name is bound anew


def test_missing_and_truncated_files(tmp_path):
    folder = sharded(tmp_path / "m")
    shards = sorted(folder.glob("*.safetensors"))
    whole = shards[0].read_bytes()
    for cut in (0, 5, 40, len(whole) - 1):
        shards[0].write_bytes(whole[:cut])
        assert f"{shards[0]} is truncated" in message(folder)
    shards[0].write_bytes(whole + b"\0")
    assert "corrupt" in message(folder) and str(shards[0]) in message(folder)
    shards[0].unlink()
    assert f"{shards[0]} is missing" in message(folder)


def test_file_that_shrinks_after_it_was_opened(tmp_path):
    folder = write(tmp_path / "m", [{"a": np.arange(64, dtype=np.float32)}])
    checkpoint, file = open_checkpoint(folder), folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match="truncated"):
        checkpoint.read("a")


def set_offsets(first: int, last: int):
    return lambda header: header["a"].update(data_offsets=[first, last])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_offsets(0, 31), "should have 32 bytes"),
        (set_offsets(8, 40), "tensor a starts at byte"),
        (set_offsets(1 << 62, (1 << 62) + 32), "corrupt"),
        (set_offsets(-32, 0), "data_offsets"),
        (lambda header: header["b"].update(data_offsets=[0, 16]), "is free"),
        (lambda header: header["a"].update(shape=[1 << 40, 1 << 40]), "should have"),
        (lambda header: header["a"].update(shape=[-8]), "has shape"),
        (lambda header: header["a"].update(shape=[True, 8]), "has shape"),
        (lambda header: header["a"].update(dtype="Q9"), "unknown dtype 'Q9'"),
        (lambda header: header.update(a=[]), "unknown dtype"),
        (lambda header: header.pop("b"), "corrupt"),
    ],
)
def test_headers_that_lie(tmp_path, change, said):
    folder = write(tmp_path / "m", [{"a": np.zeros(8, np.float32), "b": np.zeros(4, np.float32)}])
    rewrite_header(folder / "model.safetensors", change)
    text = message(folder)
    assert said in text and str(folder / "model.safetensors") in text


def test_header_that_is_no_header(tmp_path):
    folder = write(tmp_path / "m", [{"a": np.zeros(8, np.float32)}])
    file = folder / "model.safetensors"
    for content, said in (
        ((1 << 60).to_bytes(8, "little") + b"{}", "not a safetensors file"),
        ((2).to_bytes(8, "little") + b"[]", "not a JSON object"),
        ((2).to_bytes(8, "little") + b"\xff\xff", "not a JSON object"),
        ((200_000).to_bytes(8, "little") + b"[" * 200_000, "not a JSON object"),
    ):
        file.write_bytes(content)
        assert said in message(folder)


def test_index_that_lies(tmp_path):
    folder = sharded(tmp_path / "m")
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    name = next(iter(weight_map))
    outside = tmp_path / "outside.safetensors"
    shutil.copy(folder / weight_map[name], outside)
    for shard, said in (
        ("../outside.safetensors", "not a plain file name"),
        (str(outside), "not a plain file name"),
        (7, "should lie in a file"),
        ("model-00002-of-00002.safetensors", f"lacks tensor {name}"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map | {name: shard}}))
        assert said in message(folder)
    index.write_text("{}")
    assert "weight_map" in message(folder)
    index.write_text("{")
    assert f"{index} is not valid JSON" in message(folder)


def test_tensor_of_another_type_is_listed_but_not_read(tmp_path):
    folder = write(tmp_path / "m", [{"ids": np.arange(4), "w": np.zeros(4, np.float32)}])
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tensors()["ids"].dtype == "I64"
    with pytest.raises(UserError, match="ids is in I64"):
        checkpoint.read("ids")


def test_what_is_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="`hf download HuggingFaceTB/SmolLM2-135M --local-dir SmolLM2-135M`"):
        open_checkpoint("HuggingFaceTB/SmolLM2-135M")
    assert "does not exist" in message(tmp_path / "nothing" / "here")
    (tmp_path / "file.txt").write_text("x")
    assert "neither a folder nor a .gguf file" in message(tmp_path / "file.txt")
    folder = tmp_path / "m"
    folder.mkdir()
    assert "config.json is missing" in message(folder)
    (folder / "adapter_config.json").write_text("{}")
    assert "adapter" in message(folder)
    (folder / "config.json").write_text("{}")
    assert "holds no model.safetensors" in message(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    assert "no pickle" in message(folder) and "save_pretrained" in message(folder)
    for method in ("awq", "bitsandbytes", "fp8", "compressed-tensors"):
        (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
        assert f"quantized by {method}," in message(folder) and "unquantized checkpoint" in message(folder)


def test_digest_knows_content_and_not_place(tmp_path):
    first = open_checkpoint(sharded(tmp_path / "m"))
    (tmp_path / "deep").mkdir()
    moved = shutil.copytree(tmp_path / "m", tmp_path / "deep" / "other")
    assert open_checkpoint(moved).digest() == first.digest()
    (moved / "notes.txt").write_text("nothing of consequence")
    assert open_checkpoint(moved).digest() == first.digest()
    seen = {first.digest()}
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        (moved / name).write_text("{}")
        digest = open_checkpoint(moved).digest()
        assert digest not in seen
        seen.add(digest)
    shard = sorted(moved.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert open_checkpoint(moved).digest() not in seen


def test_generation_config_is_read(tmp_path):
    folder = write(tmp_path / "m", [random_tensors()])
    assert open_checkpoint(folder).generation_config == {}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 106], "top_k": 64}))
    assert open_checkpoint(folder).generation_config == {"eos_token_id": [1, 106], "top_k": 64}
