"""INT4 that a checkpoint holds already, GPTQ and GGUF's Q4_0, comes through a package bit by bit and means the same."""

import copy
import json

import families
import gguf
import ggufs
import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import numpy_helper
from safetensors.numpy import save_file
from test_checkpoints_gptq import pack

from llmtrt import LLM, quantize

GROUP = 16
IDS = np.random.default_rng(5).integers(3, 40, 40)


def initializers(package) -> dict[str, np.ndarray]:
    """Every initializer of a package's graph by its name."""
    graph = onnx.load(package / "model.onnx").graph
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def check_logits(package, model: torch.nn.Module) -> None:
    """The fp32 package on ONNX Runtime against ``model``; at level 4, whose products round activations to INT8, loosely."""
    with torch.no_grad():
        wanted = model(torch.tensor(IDS[None])).logits[0].numpy()
    with LLM(package, accuracy_level=1) as llm:
        assert np.abs(llm.logits(IDS.tolist()) - wanted).max() <= 1e-4 * np.ptp(wanted)
    with LLM(package, accuracy_level=4) as llm:
        assert np.sqrt(np.square(llm.logits(IDS.tolist()) - wanted).mean()) <= 5e-2 * np.ptp(wanted)


def gptq(name: str, folder, form: str, desc_act: bool) -> tuple[torch.nn.Module, dict[str, dict[str, np.ndarray]]]:
    """Writes families' model as a GPTQ checkpoint; the model with its rounded weights, and what each Linear is now."""
    random = np.random.default_rng(11)
    model, stored, tensors = copy.deepcopy(families.reference(name)), {}, {}
    for module, linear in model.model.named_modules(prefix="model"):
        if not isinstance(linear, torch.nn.Linear):
            continue
        weight = linear.weight.detach().numpy().T.astype(np.float64)
        g_idx = np.arange(len(weight)) // GROUP
        if desc_act:
            g_idx = random.permutation(g_idx)
        groups = [weight[g_idx == group] for group in range(g_idx.max() + 1)]
        scales = np.stack([np.abs(group).max(0) / 7.5 for group in groups]).astype(np.float16)
        wide = scales.astype(np.float64)[g_idx]
        q = np.clip(np.rint(weight / wide), -8, 7).astype(np.int64)
        linear.weight.data = torch.from_numpy((q * wide).T.astype(np.float32))
        stored[f"{module}.weight"] = {"q": q, "scales": scales, "g_idx": g_idx}
        tensors |= {
            f"{module}.qweight": pack(q + 8, 0),
            f"{module}.qzeros": pack(np.full(scales.shape, 7 if form == "gptq" else 8), 1),
            f"{module}.scales": scales,
            f"{module}.g_idx": g_idx.astype(np.int32),
        }
    for parameter, value in model.state_dict().items():
        if parameter not in stored and not (parameter == "lm_head.weight" and model.config.tie_word_embeddings):
            tensors[parameter] = value.numpy()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    settings = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": desc_act}
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    config["quantization_config"] = settings | {"checkpoint_format": form}
    (folder / "config.json").write_text(json.dumps(config))
    return model, stored


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize(("name", "form"), [("llama-gqa-tied", "gptq"), ("qwen2-tied", "gptq_v2"), ("phi3", "gptq")])
def test_gptq_comes_through_bit_by_bit(tmp_path, name, form, desc_act):
    model, stored = gptq(name, tmp_path / "checkpoint", form, desc_act)
    made = quantize(tmp_path / "checkpoint", tmp_path / "package", "fp32")
    found = initializers(tmp_path / "package")
    assert len(stored) == (4 if name == "phi3" else 7) * 3
    for weight, parts in stored.items():
        order = found.get(f"{weight.removesuffix('.weight')}.order", np.arange(len(parts["q"])))
        assert (f"{weight.removesuffix('.weight')}.order" in found) == desc_act
        assert np.array_equal(np.sort(order), np.arange(len(order)))
        assert np.array_equal(found[weight].astype(np.int64), parts["q"][order])
        assert np.array_equal(parts["g_idx"][order], np.arange(len(order)) // GROUP)
        assert np.array_equal(found[f"{weight}_scale"], parts["scales"].astype(np.float32))
        assert made.report["tensors"][weight]["as"] == "stored in the checkpoint"
    check_logits(tmp_path / "package", model)


def test_gptq_scales_stay_as_they_are_in_fp16(tmp_path):
    _, stored = gptq("llama-gqa-tied", tmp_path / "checkpoint", "gptq", False)
    quantize(tmp_path / "checkpoint", tmp_path / "package", "int4")
    found = initializers(tmp_path / "package")
    for weight, parts in stored.items():
        assert found[f"{weight}_scale"].dtype == np.float16
        assert found[f"{weight}_scale"].tobytes() == parts["scales"].tobytes()
        assert np.array_equal(found[weight].astype(np.int64), parts["q"])


@pytest.fixture(scope="module")
def q4_0(tmp_path_factory):
    """(a GGUF file, the weights that it was made of): a Llama in Q4_0 with scales of both signs and one block of
    zeros, whose scale is zero."""
    weights = ggufs.weights("llama")
    weights["model.layers.0.mlp.up_proj.weight"][3, 32:64] = 0
    path = tmp_path_factory.mktemp("q4_0") / "model.gguf"
    return ggufs.write(path, "llama", weights, gguf.GGMLQuantizationType.Q4_0), weights


def blocks(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """q [K, N] and fp16 scales [K / 32, N] of ``weight`` [N, K], read from llama.cpp's own block layout."""
    raw = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q4_0).reshape(len(weight), -1, 18)
    q, scales = np.empty((*raw.shape[:2], 32), np.int64), np.empty(raw.shape[:2], np.float16)
    for row, block in np.ndindex(*raw.shape[:2]):
        data = raw[row, block].tobytes()
        scales[row, block] = np.frombuffer(data[:2], "<f2")[0]
        q[row, block] = [byte % 16 - 8 for byte in data[2:]] + [byte // 16 - 8 for byte in data[2:]]
    return q.reshape(len(weight), -1).T, scales.T


@pytest.mark.parametrize("recipe", ["int4-g32", "fp32"])
def test_q4_0_comes_through_bit_by_bit(tmp_path, q4_0, recipe):
    path, weights = q4_0
    made = quantize(path, tmp_path / "package", recipe)
    found, signs = initializers(tmp_path / "package"), set()
    for name in [name for name in weights if name.endswith("proj.weight") or name == "lm_head.weight"]:
        q, scales = blocks(weights[name])
        assert np.array_equal(found[name].astype(np.int64), q)
        assert found[f"{name}_scale"].tobytes() == scales.astype(found[f"{name}_scale"].dtype).tobytes()
        assert made.report["tensors"][name]["block"] == 32
        signs |= {*np.sign(scales.astype(np.float64)).flatten()}
    assert found["model.layers.0.mlp.up_proj.weight_scale"].dtype == (np.float32 if recipe == "fp32" else np.float16)
    assert signs == {-1.0, 0.0, 1.0}


def test_q4_0_means_what_llama_cpp_says(tmp_path, q4_0):
    path, weights = q4_0
    config = transformers.LlamaConfig(
        vocab_size=ggufs.VOCAB,
        hidden_size=ggufs.HIDDEN,
        intermediate_size=ggufs.FFN,
        num_hidden_layers=ggufs.LAYERS,
        num_attention_heads=ggufs.HEADS,
        num_key_value_heads=ggufs.KV_HEADS,
        head_dim=ggufs.HEAD_DIM,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).eval()
    kind = gguf.GGMLQuantizationType.Q4_0
    meant = {name: torch.from_numpy(ggufs.dequantized(value, kind)) for name, value in weights.items()}
    assert model.load_state_dict(meant, strict=False) == ([], [])
    quantize(path, tmp_path / "package", "fp32")
    check_logits(tmp_path / "package", model)


def test_tensorrt_builds_negative_and_zero_scales(tmp_path, q4_0):
    pytest.importorskip("tensorrt_rtx_bindings")
    from llmtrt.engine.build import build

    quantize(q4_0[0], tmp_path / "package", "int4-g32")
    built = build(tmp_path / "package", tmp_path / "engine", max_seq=64, chunk=16)
    assert built.engine.plan.stat().st_size > 100_000
