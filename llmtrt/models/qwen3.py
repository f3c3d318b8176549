"""Qwen3 (https://arxiv.org/abs/2505.09388): Llama with a norm on each head's q and k."""

from llmtrt.models.config import ConfigReader
from llmtrt.models.decoder import Decoder, read_decoder
from llmtrt.models.qwen2 import sliding_above

ARCHITECTURES = ("Qwen3ForCausalLM",)


def read(config: ConfigReader, max_seq: int | None) -> Decoder:
    biased = config.flag("attention_bias", False)
    return read_decoder(
        config, "qwen3", max_seq, qkv_bias=biased, o_bias=biased, qk_norm=True, layers=sliding_above(config)
    )
