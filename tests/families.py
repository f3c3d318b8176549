"""Tiny random models of every family, made by transformers' own classes: the independent reference of the graph."""

import functools
import json
import math
from pathlib import Path

import torch
import transformers

SIZES = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, max_position_embeddings=256)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64)
LONG = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    long_factor=[1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
    original_max_position_embeddings=64,
    partial_rotary_factor=0.75,
)

# name → (transformers' configuration class, its fields)
CONFIGS = {
    "llama-mha-untied": ("Llama", dict(num_attention_heads=3, num_key_value_heads=3, head_dim=16)),
    "llama-gqa-tied": (
        "Llama",
        dict(num_attention_heads=6, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True),
    ),
    "llama-biases": (
        "Llama",
        dict(num_attention_heads=5, num_key_value_heads=1, hidden_size=40, attention_bias=True, mlp_bias=True),
    ),
    "llama-even": (
        "Llama",
        dict(
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            hidden_size=128,
            intermediate_size=192,
            vocab_size=98,
        ),
    ),  # in whole blocks of 64, which weights as inputs take
    "llama-whole": (
        "Llama",
        dict(
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=64,
            hidden_size=512,
            intermediate_size=1024,
            vocab_size=98,
        ),
    ),  # wide enough for TensorRT to choose the kernels that it has for real models
    "llama-rope-llama3": ("Llama", dict(num_attention_heads=4, num_key_value_heads=2, rope_parameters=LLAMA3)),
    "llama-rope-linear": (
        "Llama",
        dict(
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_parameters=dict(rope_type="linear", rope_theta=5000.0, factor=4.0),
        ),
    ),
    "mistral": ("Mistral", dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=None)),
    "mistral-sliding": ("Mistral", dict(num_attention_heads=3, num_key_value_heads=1, head_dim=16, sliding_window=9)),
    "qwen2-tied": ("Qwen2", dict(num_attention_heads=6, num_key_value_heads=3, tie_word_embeddings=True)),
    "qwen2-yarn": ("Qwen2", dict(num_attention_heads=4, num_key_value_heads=4, rope_parameters=YARN)),
    "qwen2-sliding": (
        "Qwen2",
        dict(
            num_attention_heads=4, num_key_value_heads=2, use_sliding_window=True, sliding_window=7, max_window_layers=1
        ),
    ),
    "qwen3": ("Qwen3", dict(num_attention_heads=3, num_key_value_heads=1, head_dim=32, tie_word_embeddings=True)),
    "qwen3-bias": ("Qwen3", dict(num_attention_heads=4, num_key_value_heads=4, head_dim=16, attention_bias=True)),
    "phi3": ("Phi3", dict(num_attention_heads=3, num_key_value_heads=3, pad_token_id=0, eos_token_id=2)),
    "phi3-partial": (
        "Phi3",
        dict(
            num_attention_heads=3,
            num_key_value_heads=1,
            sliding_window=11,
            pad_token_id=0,
            eos_token_id=2,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5),
        ),
    ),
    "phi3-long": (
        "Phi3",
        dict(
            num_attention_heads=3,
            num_key_value_heads=3,
            pad_token_id=0,
            eos_token_id=2,
            original_max_position_embeddings=64,
            rope_parameters=LONG,
        ),
    ),
    "phi3-even": (
        "Phi3",
        dict(
            num_attention_heads=4,
            num_key_value_heads=2,
            hidden_size=128,
            intermediate_size=256,
            pad_token_id=0,
            eos_token_id=2,
        ),
    ),
    "gemma3": (
        "Gemma3",
        dict(
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=16,
            num_hidden_layers=7,
            sliding_window=8,
            query_pre_attn_scalar=24,
        ),
    ),
    "gemma3-softcap": (
        "Gemma3",
        dict(
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            sliding_window=16,
            final_logit_softcapping=3.0,
            layer_types=["sliding_attention", "full_attention"] * 2,
            num_hidden_layers=4,
        ),
    ),
}


@functools.cache
def reference(name: str) -> torch.nn.Module:
    """The model of CONFIGS[name] in fp32 with every parameter random: biases and norms are not left at 0 and 1."""
    family, differences = CONFIGS[name]
    suffix = "TextConfig" if family == "Gemma3" else "Config"
    config = getattr(transformers, family + suffix)(**SIZES | differences, attn_implementation="eager")
    torch.manual_seed(len(name))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 2 / math.sqrt(parameter.shape[1]))
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        # Peaked logits, so that a wrong token shows and rounding does not choose it. A tied head must not find the
        # current token's own row in the residual, or the model repeats one token for ever.
        model.get_output_embeddings().weight.normal_(
            0, (0.01 if family == "Gemma3" else 0.1) if config.tie_word_embeddings else 1
        )
    return model


def save(name: str, folder: Path, **config_fields) -> Path:
    """The model as a checkpoint folder; ``config_fields`` are then added to its config.json."""
    reference(name).save_pretrained(folder)
    if config_fields:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | config_fields))
    return folder
