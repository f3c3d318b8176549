"""Gemma 3 text (https://arxiv.org/abs/2503.19786): five local layers to each global one, norms on both sides."""

from dataclasses import replace

from llmtrt.models.config import ConfigReader
from llmtrt.models.decoder import Decoder, read_decoder, read_head_dim, windowed
from llmtrt.models.rope import Rope, read_rope

ARCHITECTURES = ("Gemma3ForCausalLM",)


def read(config: ConfigReader, max_seq: int | None) -> Decoder:
    period = config.count("sliding_window_pattern", None) or config.count("_sliding_window_pattern", 6)
    config.raw("_sliding_window_pattern")
    layers = windowed(config, config.count("sliding_window", 4096), lambda index: (index + 1) % period)
    config.only("use_bidirectional_attention", False)
    config.only("attn_logit_softcapping", None)
    biased = config.flag("attention_bias", False)
    head_dim = read_head_dim(config, 256)
    return read_decoder(
        config,
        "gemma3",
        max_seq,
        activation_field="hidden_activation" if "hidden_activation" in config else "hidden_act",
        tied=True,
        layers=tuple(replace(layer, rope=1 if layer.window else 0) for layer in layers),
        ropes=(
            _rope(config, "full_attention", head_dim, max_seq),
            _rope(config, "sliding_attention", head_dim, max_seq),
        ),
        head_dim=head_dim,
        attention_scale=config.number("query_pre_attn_scalar", 256) ** -0.5,
        embedding_scale=config.count("hidden_size") ** 0.5,
        logit_softcap=config.number("final_logit_softcapping", None),
        qkv_bias=biased,
        o_bias=biased,
        qk_norm=True,
        norm_offset=1.0,
        post_norms=True,
    )


def _rope(config: ConfigReader, layer_type: str, head_dim: int, max_seq: int | None) -> Rope:
    """Local layers have a base of their own and are never stretched."""
    positions = config.count("max_position_embeddings")
    if (both := config.part("rope_parameters")) is not None and layer_type in both:
        parameters, theta = both.part(layer_type), None
        both.raw("full_attention"), both.raw("sliding_attention")
        both.finish()
    elif layer_type == "full_attention":
        parameters, theta = config.part("rope_scaling"), config.number("rope_theta", 1_000_000.0)
    else:
        parameters, theta = None, config.number("rope_local_base_freq", 10_000.0)
    return read_rope(
        parameters or ConfigReader({}, "rope_scaling"), head_dim, positions, max_seq or positions, theta=theta
    )
