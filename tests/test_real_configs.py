"""config.json as published models have it, read as transformers reads it.

tests/configs.json was written from memory of the models' own files, every field among them that a reader must know.
"""

import copy
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from llmtrt.models import decoder_of

CONFIGS = json.loads((Path(__file__).parent / "configs.json").read_text())
BOOKKEEPING = ("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path")


def theirs(config: dict):
    """transformers' configuration and its rotary embedding."""
    kind = config["model_type"].removesuffix("_text")
    name = config["architectures"][0].removesuffix("ForCausalLM")
    kept = {field: value for field, value in copy.deepcopy(config).items() if field not in BOOKKEEPING}
    made = getattr(transformers, name + ("TextConfig" if kind == "gemma3" else "Config"))(**kept)
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    return made, getattr(module, f"{name}RotaryEmbedding")(config=made)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_understood_as_transformers_does(name):
    config = CONFIGS[name]
    ours, (wanted, rotary) = decoder_of(copy.deepcopy(config), name), theirs(config)
    head_dim = getattr(wanted, "head_dim", None) or wanted.hidden_size // wanted.num_attention_heads
    assert (
        ours.head_dim,
        ours.kv_heads,
        ours.intermediate,
        ours.vocab_size,
        ours.tied,
        ours.norm_eps,
        ours.max_seq,
    ) == (
        head_dim,
        wanted.num_key_value_heads,
        wanted.intermediate_size,
        wanted.vocab_size,
        wanted.tie_word_embeddings,
        wanted.rms_norm_eps,
        wanted.max_position_embeddings,
    )
    window = getattr(wanted, "sliding_window", None)
    types = getattr(wanted, "layer_types", None)
    if config["model_type"] in ("mistral", "phi3"):
        windows = [window] * wanted.num_hidden_layers
    else:
        windows = [
            window if types and types[i] == "sliding_attention" else None for i in range(wanted.num_hidden_layers)
        ]
    # One that spans every position is none.
    windows = [None if each and each >= ours.max_seq else each for each in windows]
    assert [layer.window for layer in ours.layers] == windows
    if config["model_type"] == "gemma3_text":
        assert [layer.rope for layer in ours.layers] == [int(kind == "sliding_attention") for kind in types]
        assert ours.embedding_scale == wanted.hidden_size**0.5
        assert ours.attention_scale == wanted.query_pre_attn_scalar**-0.5
        for rope, kind in zip(ours.ropes, ("full_attention", "sliding_attention")):
            _same_rope(rope, getattr(rotary, f"{kind}_inv_freq"), getattr(rotary, f"{kind}_attention_scaling"))
        return
    assert ours.attention_scale == head_dim**-0.5
    if wanted.rope_parameters["rope_type"] == "longrope":  # transformers chooses by the positions it sees
        rotary(torch.zeros(1, 1, head_dim), torch.tensor([[ours.max_seq - 1]]))
        short = decoder_of(copy.deepcopy(config), name, wanted.original_max_position_embeddings).ropes[0]
        fresh = theirs(config)[1]
        fresh(torch.zeros(1, 1, head_dim), torch.tensor([[5]]))
        _same_rope(short, fresh.inv_freq, fresh.attention_scaling)
    _same_rope(ours.ropes[0], rotary.inv_freq, rotary.attention_scaling)


def _same_rope(ours, inv_freq, scaling):
    assert ours.inv_freq.shape == tuple(inv_freq.shape)
    assert np.abs(ours.inv_freq / inv_freq.numpy() - 1).max() < 1e-6
    assert ours.scaling == pytest.approx(scaling, rel=1e-12)
