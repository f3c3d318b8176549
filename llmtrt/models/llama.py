"""Llama 2, 3, 3.1 and 3.2 (https://arxiv.org/abs/2407.21783), and models of its shape such as SmolLM2."""

from llmtrt.models.config import ConfigReader
from llmtrt.models.decoder import Decoder, read_decoder

ARCHITECTURES = ("LlamaForCausalLM",)


def read(config: ConfigReader, max_seq: int | None) -> Decoder:
    biased = config.flag("attention_bias", False)
    return read_decoder(
        config, "llama", max_seq, qkv_bias=biased, o_bias=biased, mlp_bias=config.flag("mlp_bias", False)
    )
