"""A real GGUF file, SmolLM2-135M-Instruct: names, values, config, tokenizer, chat template against other readers."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import gguf
import ggufs
import numpy as np
import pytest
import samples
from tokenizers import Tokenizer, pre_tokenizers

from llmtrt.checkpoints import open_checkpoint
from llmtrt.checkpoints.checkpoint import Checkpoint
from llmtrt.models import decoder_of


@functools.cache
def checkpoint() -> Checkpoint:
    return open_checkpoint(samples.smollm2_gguf())


@functools.cache
def stored() -> dict:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(samples.smollm2_gguf()).tensors}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    checkpoint().write_tokenizer(folder)
    return folder


def test_names_and_shapes_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**checkpoint().config))
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items() if name != "lm_head.weight"}
    assert {name: info.shape for name, info in checkpoint().tensors().items()} == wanted
    assert len(wanted) == len(stored()) == 272


@pytest.mark.parametrize(
    ("name", "theirs", "heads"),
    [
        ("model.embed_tokens.weight", "token_embd.weight", 0),
        ("model.norm.weight", "output_norm.weight", 0),
        ("model.layers.3.self_attn.q_proj.weight", "blk.3.attn_q.weight", 9),
        ("model.layers.29.self_attn.k_proj.weight", "blk.29.attn_k.weight", 3),
        ("model.layers.29.self_attn.v_proj.weight", "blk.29.attn_v.weight", 0),
        ("model.layers.11.mlp.down_proj.weight", "blk.11.ffn_down.weight", 0),
    ],
)
def test_values(name, theirs, heads):
    tensor = stored()[theirs]
    wanted = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    read = checkpoint().read(name)
    assert read.dtype == np.float32
    assert np.array_equal(ggufs.interleaved(read, heads) if heads else read, wanted)
    assert np.array_equal(checkpoint().read(name, slice(100, 165)), read[100:165])


def test_config():
    config = checkpoint().config
    decoder = decoder_of(config, "SmolLM2")
    assert (decoder.family, decoder.hidden, len(decoder.layers), decoder.tied) == ("llama", 576, 30, True)
    assert (config["rope_theta"], config["rms_norm_eps"], config["eos_token_id"]) == (100000.0, 1e-5, 2)
    assert checkpoint().generation_config == {"eos_token_id": [2, 0]}


def test_tokenizer_equals_the_original(tokenizer):
    """SmolLM2's own tokenizer.json isolates digits before GPT-2's rule; transformers' conversion leaves that out."""
    made = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    theirs = Tokenizer.from_file(str(samples.smollm2_tokenizer() / "tokenizer.json"))
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    for name in ("wikitext2-test.txt", "code-sample.txt", "tinyshakespeare.txt"):
        text = samples.data(name).read_text(encoding="utf-8")[:200_000]
        ids = made.encode(text).ids
        assert ids == theirs.encode(text).ids and made.decode(ids) == text
    chat = "<|im_start|>user\nHi<|im_end|>\n"
    assert made.encode(chat).ids == theirs.encode(chat).ids and made.encode(chat).ids[0] == 1
    assert made.decode(made.encode(chat).ids, skip_special_tokens=True) == "user\nHi\n"


def test_transformers_loads_what_we_wrote(tokenizer):
    transformers = pytest.importorskip("transformers")
    ours = transformers.AutoTokenizer.from_pretrained(tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(samples.smollm2_tokenizer())
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    assert config["bos_token"] == "<|im_start|>" and config["eos_token"] == "<|im_end|>" and not config["add_bos_token"]
    for messages in (
        [{"role": "user", "content": "What is the capital of France?"}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Ho"},
        ],
    ):
        text = ours.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text.endswith("<|im_start|>assistant\n")


def test_reading_every_tensor_neither_grows_nor_imports_torch():
    """In a process of its own: after the largest tensor, the 271 others leave peak memory where it was."""
    code = """
import resource, sys
from llmtrt.checkpoints import open_checkpoint
checkpoint = open_checkpoint(sys.argv[1])
checkpoint.read("model.embed_tokens.weight")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in checkpoint.tensors():
    checkpoint.read(name)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert not {"torch", "transformers", "onnx"} & sys.modules.keys()
print(grown)
"""
    path = samples.smollm2_gguf()
    output = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    # The file has 94 MiB; mapped and read through, they would count.
    assert int(output.stdout) * 1024 < 16 << 20 < path.stat().st_size
