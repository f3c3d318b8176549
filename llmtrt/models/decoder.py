"""The one shape that all our families share: a pre-norm decoder, described by what a graph writer has to know."""

from dataclasses import dataclass, replace

from llmtrt.models.config import ConfigReader
from llmtrt.models.rope import Rope, read_rope

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}


@dataclass(frozen=True)
class Layer:
    """``window``: how many positions a token attends to, its own among them (None: all); ``rope``: an index."""

    window: int | None = None
    rope: int = 0


@dataclass(frozen=True)
class Decoder:
    """A decoder-only transformer: embedding, ``layers`` × (norm, attention, norm, gated MLP), norm, head.

    Sizes are in elements. ``norm_offset`` is added to every norm's weight (Gemma stores weight − 1). ``post_norms``: the
    attention's and the MLP's results pass a norm of their own before they are added. ``packed``: q, k, v and gate, up lie
    in one weight each. ``attention_scale`` multiplies q·k. ``logit_softcap`` bounds logits as cap · tanh(x / cap).
    """

    family: str
    vocab_size: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    activation: str
    tied: bool
    max_seq: int
    attention_scale: float
    layers: tuple[Layer, ...]
    ropes: tuple[Rope, ...]
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    post_norms: bool = False
    packed: bool = False
    embedding_scale: float = 1.0
    logit_softcap: float | None = None


def read_decoder(
    config: ConfigReader,
    family: str,
    max_seq: int | None,
    *,
    activation_field: str = "hidden_act",
    tied: bool = False,
    partial_rope: bool = False,
    **differences,
) -> Decoder:
    """What every family's config.json has in common; ``differences`` replace fields of the Decoder.

    ``max_seq`` is the declared capacity in tokens, the configuration's max_position_embeddings where it is None. Raises
    UserError naming the field that is missing, of a wrong type or out of range.
    """
    hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
    kv_heads = config.count("num_key_value_heads", heads)
    head_dim = differences.pop("head_dim", None) or read_head_dim(config, hidden // heads)
    if heads % kv_heads:
        raise config.refuse(f"num_attention_heads = {heads} should be a multiple of num_key_value_heads = {kv_heads}")
    positions = config.count("max_position_embeddings")
    max_seq = positions if max_seq is None else max_seq
    if not 0 < max_seq <= positions:
        raise config.refuse(f"--max-seq {max_seq} should be from 1 to the model's max_position_embeddings, {positions}")
    layers = differences.pop("layers", None) or (Layer(),) * read_layer_count(config)
    # A window that no position leaves is none: Phi-3 has one of 262,144 over 131,072 positions.
    layers = tuple(replace(layer, window=None) if (layer.window or 0) >= max_seq else layer for layer in layers)
    ropes = differences.pop("ropes", None) or (one_rope(config, head_dim, max_seq, partial_rope),)
    config.only("is_encoder_decoder", False)
    return replace(
        Decoder(
            family=family,
            vocab_size=config.count("vocab_size"),
            hidden=hidden,
            intermediate=config.count("intermediate_size"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            norm_eps=config.number("rms_norm_eps"),
            activation=ACTIVATIONS[config.only(activation_field, *ACTIVATIONS)],
            tied=config.flag("tie_word_embeddings", tied),
            max_seq=max_seq,
            attention_scale=head_dim**-0.5,
            layers=layers,
            ropes=ropes,
        ),
        **differences,
    )


def read_head_dim(config: ConfigReader, default: int) -> int:
    """head_dim, which rotary embeddings need to be even."""
    head_dim = config.count("head_dim", None, limit=1 << 13) or default
    if head_dim % 2:
        raise config.refuse(f"head_dim should be even for rotary embeddings, but is {head_dim}")
    return head_dim


def read_layer_count(config: ConfigReader) -> int:
    """num_hidden_layers, bounded: it is all that a damaged file needs to fill the memory."""
    return config.count("num_hidden_layers", limit=10_000)


def one_rope(config: ConfigReader, head_dim: int, max_seq: int, partial: bool = False) -> Rope:
    """The rope of a model whose layers all have the same, from ``rope_parameters`` or its older spelling.

    ``partial``: whether the family may rotate but a share of each head.
    """
    theta = config.number("rope_theta", None)
    share = config.number("partial_rotary_factor", 1.0) if partial else None
    original = config.count("original_max_position_embeddings", None)
    if "rope_parameters" in config and "rope_scaling" in config:
        raise config.refuse(
            "rope_parameters and its older spelling, rope_scaling, are both given: keep the one that holds"
        )
    parameters = config.part("rope_parameters") or config.part("rope_scaling") or ConfigReader({}, "rope_parameters")
    return read_rope(parameters, head_dim, config.count("max_position_embeddings"), max_seq, original, share, theta)


def windowed(config: ConfigReader, window: int | None, sliding=lambda index: True) -> tuple[Layer, ...]:
    """Layers of which those in ``layer_types``, or else those that ``sliding(index)`` names, see only a window."""
    count = read_layer_count(config)
    types = config.names("layer_types", count, ("full_attention", "sliding_attention"))
    local = (
        [kind == "sliding_attention" for kind in types]
        if types
        else [bool(window) and sliding(i) for i in range(count)]
    )
    if any(local) and not window:
        raise config.refuse("layer_types has sliding_attention layers, but sliding_window gives no size")
    return tuple(Layer(window if is_local else None) for is_local in local)
