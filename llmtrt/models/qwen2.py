"""Qwen2 and Qwen2.5 (https://arxiv.org/abs/2407.10671): Llama with biases on q, k and v; upper layers may slide."""

from llmtrt.models.config import ConfigReader
from llmtrt.models.decoder import Decoder, Layer, read_decoder, windowed

ARCHITECTURES = ("Qwen2ForCausalLM",)


def read(config: ConfigReader, max_seq: int | None) -> Decoder:
    return read_decoder(config, "qwen2", max_seq, qkv_bias=True, layers=sliding_above(config))


def sliding_above(config: ConfigReader) -> tuple[Layer, ...]:
    """Qwen's rule: with use_sliding_window, the layers from max_window_layers on see a window."""
    window, first = config.count("sliding_window", None), config.raw("max_window_layers")
    used = config.flag("use_sliding_window", False)
    if used and type(first) is not int:
        raise config.refuse(f"max_window_layers should be an integer, but is {first!r}")
    return windowed(config, window if used else None, lambda index: index >= first)
