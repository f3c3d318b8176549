"""Phi-3 and Phi-4-mini (https://arxiv.org/abs/2404.14219): Llama with q, k, v and gate, up in one weight each."""

from llmtrt.models.config import ConfigReader
from llmtrt.models.decoder import Decoder, read_decoder, windowed

ARCHITECTURES = ("Phi3ForCausalLM",)


def read(config: ConfigReader, max_seq: int | None) -> Decoder:
    for name, only in (("attention_bias", False), ("full_attn_mod", 1), ("interpolate_factor", 1)):
        config.only(name, only)
    return read_decoder(
        config,
        "phi3",
        max_seq,
        partial_rope=True,
        packed=True,
        layers=windowed(config, config.count("sliding_window", None)),
    )
