"""Mistral 7B (https://arxiv.org/abs/2310.06825): Llama whose layers may all see a sliding window."""

from llmtrt.models.config import ConfigReader
from llmtrt.models.decoder import Decoder, read_decoder, windowed

ARCHITECTURES = ("MistralForCausalLM",)


def read(config: ConfigReader, max_seq: int | None) -> Decoder:
    if not config.states("sliding_window"):
        raise config.refuse("the field sliding_window is missing: expected a number of tokens, or null for none")
    return read_decoder(config, "mistral", max_seq, layers=windowed(config, config.count("sliding_window", None)))
