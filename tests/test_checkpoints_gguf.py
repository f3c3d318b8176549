"""GGUF files of every architecture: names, values, the conversions undone, Q4_0 bit by bit, the config, damage."""

import os

import gguf
import ggufs
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from llmtrt.checkpoints import open_checkpoint
from llmtrt.errors import UserError
from llmtrt.models import decoder_of

ARCHITECTURES = ("llama", "qwen2", "qwen3", "phi3", "gemma3")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0])
def test_values_under_hugging_face_names(tmp_path, architecture, kind):
    wanted = ggufs.weights(architecture)
    checkpoint = open_checkpoint(ggufs.write(tmp_path / "m.gguf", architecture, wanted, kind))
    assert checkpoint.tensors().keys() == wanted.keys()
    dtypes = {Type.F16: np.float16, Type.BF16: ml_dtypes.bfloat16}
    for name, value in wanted.items():
        info, read = checkpoint.tensors()[name], checkpoint.read(name)
        assert info.shape == value.shape and info.dtype == ("F32" if value.ndim == 1 else kind.name)
        assert read.dtype == (np.float32 if value.ndim == 1 else dtypes.get(kind, np.float32))
        kept = ggufs.dequantized(value, kind)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            assert np.abs(read - kept).max() <= 2.0**-22  # half a step of float32 near w + 1, for |w| < 4
        else:
            assert np.array_equal(read.astype(np.float32), kept)
        for rows in (slice(1, 2), slice(3, 14), slice(5, None), slice(0, 0)):
            assert checkpoint.read(name, rows).tobytes() == read[rows].tobytes()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_q4_0_passes_through_bit_by_bit(tmp_path, architecture):
    wanted = ggufs.weights(architecture)
    checkpoint = open_checkpoint(ggufs.write(tmp_path / "m.gguf", architecture, wanted, Type.Q4_0))
    negative = 0
    for name, value in wanted.items():
        if value.ndim == 1 or name == "model.embed_tokens.weight":
            assert checkpoint.tensors()[name].dtype == ("F32" if value.ndim == 1 else "Q4_0")
            continue
        assert checkpoint.tensors()[name].dtype == "int4"
        blocks = checkpoint.read_blocks(name)
        n, k = value.shape
        assert (blocks.q.shape, blocks.q.dtype, blocks.group_size, blocks.order) == ((k, n), np.int8, 32, None)
        stored = gguf.quants.quantize(value, Type.Q4_0).reshape(n, k // 32, 18)
        assert blocks.scale.dtype == np.float16
        assert blocks.scale.T.tobytes() == np.ascontiguousarray(stored[:, :, :2]).tobytes()
        negative += int((blocks.scale < 0).sum())
        packed = (blocks.q.T.reshape(n, k // 32, 2, 16) + 8).astype(np.uint8)
        assert np.array_equal(packed[:, :, 0] | packed[:, :, 1] << 4, stored[:, :, 2:])
        meant = (blocks.q * np.repeat(blocks.scale.astype(np.float64), 32, axis=0)).T
        assert np.array_equal(checkpoint.read(name), meant.astype(np.float32))
    assert negative > 100
    assert np.array_equal(
        checkpoint.read("model.embed_tokens.weight"), ggufs.dequantized(wanted["model.embed_tokens.weight"], Type.Q4_0)
    )


def test_llama_rows_give_the_same_scores_under_both_ropes(tmp_path):
    """llama.cpp rotates neighbours (2i, 2i + 1) of its rows, Hugging Face (i, i + half) of ours: q·k is the same."""
    path = ggufs.write(tmp_path / "m.gguf", "llama", ggufs.weights("llama"))
    checkpoint = open_checkpoint(path)
    stored = {tensor.name: tensor.data.astype(np.float64) for tensor in gguf.GGUFReader(path).tensors}
    ours = {part: checkpoint.read(f"model.layers.1.self_attn.{part}_proj.weight").astype(np.float64) for part in "qk"}
    random, half = np.random.default_rng(3), ggufs.HEAD_DIM // 2
    x, positions = random.standard_normal((5, ggufs.HIDDEN)), np.array([0, 1, 2, 7, 100])
    turn = np.exp(1j * positions[:, None] * 10000.0 ** (-np.arange(half) / half))[:, None, :]

    def heads(weight):
        return (x @ weight.T).reshape(5, -1, ggufs.HEAD_DIM)

    def scores(q, k):
        groups = q.shape[1] // k.shape[1]
        return np.einsum("shd,thd->hst", q, np.repeat(k.conj(), groups, axis=1)).real

    theirs = scores(
        *[(v[..., 0::2] + 1j * v[..., 1::2]) * turn for v in (heads(stored[f"blk.1.attn_{p}.weight"]) for p in "qk")]
    )
    mine = scores(*[(v[..., :half] + 1j * v[..., half:]) * turn for v in (heads(ours[p]) for p in "qk")])
    assert np.allclose(theirs, mine, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_values_equal_those_of_transformers(tmp_path, architecture):
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    wanted = ggufs.weights(architecture)
    checkpoint = open_checkpoint(path := ggufs.write(tmp_path / "m.gguf", architecture, wanted, Type.Q8_0))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**checkpoint.config))
    theirs = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    assert theirs.keys() == checkpoint.tensors().keys()
    for name, value in theirs.items():
        assert np.array_equal(checkpoint.read(name), value.numpy()), name


def test_config_says_what_the_metadata_say(tmp_path):
    path = ggufs.write(
        tmp_path / "m.gguf",
        "qwen3",
        ggufs.weights("qwen3", tied=True),
        metadata={
            "qwen3.rope.scaling.type": "yarn",
            "qwen3.rope.scaling.factor": 4.0,
            "qwen3.rope.scaling.original_context_length": 128,
            "tokenizer.ggml.bos_token_id": 3,
            "tokenizer.ggml.eos_token_id": 5,
            "tokenizer.ggml.eot_token_id": 7,
            "general.sampling.temp": 0.7,
            "general.sampling.top_k": 20,
        },
    )
    checkpoint = open_checkpoint(path)
    assert checkpoint.config == {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 40,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "original_max_position_embeddings": 128,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
        "bos_token_id": 3,
        "eos_token_id": 5,
        "pad_token_id": None,
    }
    assert checkpoint.generation_config == {"eos_token_id": [5, 7], "temperature": 0.7, "top_k": 20, "do_sample": True}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_families_understand_the_config(tmp_path, architecture):
    for tied in (False, True):
        path = ggufs.write(tmp_path / f"{tied}.gguf", architecture, ggufs.weights(architecture, tied))
        decoder = decoder_of(open_checkpoint(path).config, str(path))
        assert (decoder.family, decoder.tied, decoder.head_dim, decoder.kv_heads) == (architecture, tied, 16, 2)


def test_gemma3_layers(tmp_path):
    tensors = ggufs.weights("gemma3", tied=True)
    window = {"gemma3.attention.sliding_window": 8, "gemma3.rope.freq_base": 1e6}
    linear = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    config = open_checkpoint(ggufs.write(tmp_path / "a.gguf", "gemma3", tensors, metadata=window | linear)).config
    assert config["layer_types"] == ["sliding_attention"] * 2 and config["sliding_window"] == 8
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 1e4)
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0} and config["query_pre_attn_scalar"] == 16
    decoder = decoder_of(config, "a")
    assert [layer.window for layer in decoder.layers] == [8, 8] and decoder.activation == "gelu_tanh"
    pattern = {"gemma3.attention.sliding_window_pattern": [True, False]}
    config = open_checkpoint(ggufs.write(tmp_path / "b.gguf", "gemma3", tensors, metadata=window | pattern)).config
    assert config["layer_types"] == ["sliding_attention", "full_attention"]
    config = open_checkpoint(ggufs.write(tmp_path / "c.gguf", "gemma3", tensors)).config
    assert config["layer_types"] == ["full_attention"] * 2 and config["sliding_window"] is None


def test_a_llama_with_a_window_is_a_mistral(tmp_path):
    path = ggufs.write(
        tmp_path / "m.gguf", "llama", ggufs.weights("llama"), metadata={"llama.attention.sliding_window": 9}
    )
    decoder = decoder_of(open_checkpoint(path).config, "m")
    assert decoder.family == "mistral" and decoder.layers[0].window == 9


@pytest.mark.parametrize("known", [True, False])
def test_rope_freqs_become_rope_scaling(tmp_path, known):
    """The frequencies that our models compute of the config are the base ones divided by the file's factors."""
    half = ggufs.HEAD_DIM // 2
    base = 500000.0 ** -(np.arange(half) / half)
    if known:
        torch = pytest.importorskip("torch")
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        parameters = {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        config = LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=parameters)
        wanted = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0].double().numpy()
        factors = (base / wanted).astype(np.float32)
    else:
        factors = np.linspace(1, 5, half, dtype=np.float32)
        wanted = base / factors
    path = ggufs.write(
        tmp_path / "m.gguf",
        "llama",
        ggufs.weights("llama"),
        extra={"rope_freqs.weight": factors},
        metadata={"llama.rope.freq_base": 500000.0},
    )
    checkpoint = open_checkpoint(path)
    assert checkpoint.config["rope_scaling"]["rope_type"] == ("llama3" if known else "longrope")
    if known:
        assert checkpoint.config["rope_scaling"]["factor"] == pytest.approx(32, rel=1e-6)
    for max_seq in (128, 512):
        rope = decoder_of(checkpoint.config, "m", max_seq).ropes[0]
        assert np.allclose(rope.inv_freq, wanted, rtol=3e-6, atol=0) and rope.scaling == 1.0
    assert "rope_freqs.weight" not in checkpoint.tensors() and len(checkpoint.tensors()) == len(ggufs.weights("llama"))


def test_phi3_long_rope(tmp_path):
    short, long = np.linspace(1, 2, 6, dtype=np.float32), np.linspace(1, 9, 6, dtype=np.float32)
    metadata = {
        "phi3.rope.dimension_count": 12,
        "phi3.rope.scaling.original_context_length": 128,
        "phi3.rope.scaling.attn_factor": 1.25,
        "phi3.attention.sliding_window": 0,
    }
    extra = {"rope_factors_short.weight": short, "rope_factors_long.weight": long}
    path = ggufs.write(tmp_path / "m.gguf", "phi3", ggufs.weights("phi3"), metadata=metadata, extra=extra)
    config = open_checkpoint(path).config
    assert "sliding_window" not in config and config["partial_rotary_factor"] == 0.75
    base = 10000.0 ** -(np.arange(6) / 6)
    for max_seq, factors in ((128, short), (512, long)):
        rope = decoder_of(config, "m", max_seq).ropes[0]
        assert np.allclose(rope.inv_freq, base / factors, rtol=1e-6, atol=0) and rope.scaling == 1.25
    path = ggufs.write(
        tmp_path / "n.gguf",
        "phi3",
        ggufs.weights("phi3"),
        metadata=metadata,
        extra={"rope_factors_short.weight": short},
    )
    with pytest.raises(UserError, match="rope_factors_long.weight"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("architecture", "metadata", "extra", "said"),
    [
        ("mamba", None, {}, "architecture 'mamba'"),
        ("llama", {"llama.expert_count": 8}, {}, "llama.expert_count = 8"),
        ("llama", {"llama.logit_scale": 0.5}, {}, "llama.logit_scale = 0.5"),
        ("qwen2", {"qwen2.attention.sliding_window": 9}, {}, "qwen2.attention.sliding_window = 9"),
        ("llama", {"llama.block_count": None}, {}, "llama.block_count should be a positive integer"),
        ("llama", {"llama.attention.head_count_kv": [1, 2]}, {}, "llama.attention.head_count_kv should be"),
        ("llama", {"llama.rope.scaling.type": "alibi", "llama.rope.scaling.factor": 2.0}, {}, "RoPE scaling 'alibi'"),
        ("llama", {"llama.rope.freq_base": "x"}, {}, "llama.rope.freq_base should be a number"),
        ("llama", {"split.count": 3}, {}, "llama-gguf-split --merge"),
        ("llama", None, {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}, "tensor blk.0.attn_sinks.weight"),
        ("llama", None, {"rope_freqs.weight": np.ones(4, np.float32)}, "should have 8 factors"),
        ("llama", None, {"blk.0.attn_q.bias": np.ones(13, np.float32)}, "4 heads cannot share"),
        ("llama", None, {"blk.0.ffn_up.bias": np.ones(96, np.int8)}, "I8"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, architecture, metadata, extra, said):
    tensors = ggufs.weights("llama") if architecture == "mamba" else ggufs.weights(architecture)
    path = ggufs.write(tmp_path / "m.gguf", architecture, tensors, metadata=metadata, extra=extra)
    with pytest.raises(UserError) as caught:
        open_checkpoint(path)
    assert said in str(caught.value) and str(path) in str(caught.value)


def test_files_cut_anywhere_are_refused(tmp_path):
    metadata = {"tokenizer.ggml.scores": [1.0] * 50, "tokenizer.ggml.tokens": [f"t{i}" for i in range(50)]}
    path = ggufs.write(tmp_path / "m.gguf", "llama", ggufs.weights("llama"), Type.Q8_0, metadata)
    data = path.read_bytes()
    open_checkpoint(path)
    end = min(tensor.data_offset for tensor in gguf.GGUFReader(path).tensors)
    last = max(tensor.data_offset + tensor.n_bytes for tensor in gguf.GGUFReader(path).tensors)
    for cut in [*range(0, end, 97), end, (end + last) // 2, last - 1]:
        path.write_bytes(data[:cut])
        with pytest.raises(UserError, match="truncated or not a GGUF file"):
            open_checkpoint(path)


def test_random_damage_of_the_header_never_ends_in_another_error(tmp_path):
    metadata = {"tokenizer.ggml.scores": [1.0] * 9, "tokenizer.ggml.tokens": [f"t{i}" for i in range(9)]}
    path = ggufs.write(tmp_path / "m.gguf", "llama", ggufs.weights("llama"), Type.Q4_0, metadata)
    data, end = path.read_bytes(), min(tensor.data_offset for tensor in gguf.GGUFReader(path).tensors)
    random, refused = np.random.default_rng(0), 0
    for _ in range(400):
        damaged = bytearray(data)
        for place in random.integers(0, end, 3):
            damaged[place] = int(random.integers(0, 256))
        path.write_bytes(damaged)
        try:
            checkpoint = open_checkpoint(path)
        except UserError as error:
            refused += 1
            assert str(path) in str(error)
        else:
            assert checkpoint.tensors()
    assert refused > 200


def test_digest_is_of_the_bytes(tmp_path):
    path = ggufs.write(tmp_path / "m.gguf", "llama", ggufs.weights("llama"))
    digest = open_checkpoint(path).digest()
    os.rename(path, tmp_path / "n.gguf")
    assert open_checkpoint(tmp_path / "n.gguf").digest() == digest
    data = bytearray((tmp_path / "n.gguf").read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert open_checkpoint(path).digest() != digest
