"""A field of config.json that would change the mathematics is refused by name, in every family."""

import pytest
from families import CONFIGS, reference

from llmtrt.errors import UserError
from llmtrt.models import decoder_of

ONE_EACH = ("llama-gqa-tied", "mistral", "qwen2-tied", "qwen3", "phi3", "gemma3")


def config_of(name: str) -> dict:
    model = reference(name)
    return model.config.to_dict() | {"architectures": [type(model).__name__]}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_writes_is_understood(name):
    decoder = decoder_of(config_of(name), "config.json")
    config = reference(name).config
    assert (decoder.hidden, decoder.heads, decoder.kv_heads) == (
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    assert len(decoder.layers) == config.num_hidden_layers


@pytest.mark.parametrize("name", ONE_EACH)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "relu"),
        ("logit_scale", 0.5),
        ("residual_multiplier", 0.22),
        ("attn_logit_softcapping", 50.0),
        ("clip_qkv", 8.0),
        ("num_experts", 8),
        ("use_parallel_residual", True),
        ("rope_interleaved", True),
        ("layer_types", ["linear_attention"] * 7),
        ("rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
        ("attention_chunk_size", 64),
        ("norm_type", "layernorm"),
        ("use_bidirectional_attention", True),
        ("num_key_value_heads", 5),
        ("is_encoder_decoder", True),
        ("num_hidden_layers", -1),
        ("hidden_size", "48"),
        ("cross_attention_layers", [1]),
        ("mup_scale", 0),
        ("head_dim", 15),
    ],
)
def test_fields_of_consequence_are_refused_by_name(name, field, value):
    config = config_of(name)
    if field == "hidden_act" and "hidden_activation" in config:
        field = "hidden_activation"
    config[field] = value
    if field == "rope_scaling":
        del config["rope_parameters"]
    # A family that knows no layer types must not overlook them either.
    with pytest.raises(UserError) as refusal:
        decoder_of(config, "there/config.json")
    assert "there/config.json" in str(refusal.value)
    said = {"rope_scaling": "rope_type", "is_encoder_decoder": "is_encoder_decoder"}.get(field, field)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ONE_EACH)
def test_unknown_fields_inside_the_rope_are_refused(name):
    config = config_of(name)
    rope = config["rope_parameters"]
    for part in rope.values() if name == "gemma3" else [rope]:
        part["mrope_section"] = [2, 3, 3]
    with pytest.raises(UserError, match="mrope_section"):
        decoder_of(config, "config.json")


def test_a_field_known_to_change_nothing_can_be_ignored_by_name():
    config = config_of("qwen3") | {"my_note": "fine-tuned on cats"}
    with pytest.raises(UserError, match="--ignore-field my_note"):
        decoder_of(config, "config.json")
    assert decoder_of(config, "config.json", ignore=["my_note"]) is not None


def test_fields_that_are_off_are_of_no_consequence():
    assert (
        decoder_of(config_of("mistral") | {"logit_scale": None, "clip_qkv": False}, "config.json").family == "mistral"
    )


def test_unknown_architectures_are_named():
    with pytest.raises(UserError, match="'FalconForCausalLM' is not supported: llmtrt has LlamaForCausalLM"):
        decoder_of({"architectures": ["FalconForCausalLM"]}, "config.json")


def test_older_spelling_of_rope_gives_the_same_decoder():
    config = config_of("llama-rope-llama3")
    parameters = dict(config.pop("rope_parameters"))
    old = config | {"rope_theta": parameters.pop("rope_theta"), "rope_scaling": parameters}
    new = decoder_of(config_of("llama-rope-llama3"), "config.json")
    assert (decoder_of(old, "config.json").ropes[0].inv_freq == new.ropes[0].inv_freq).all()
    gemma = config_of("gemma3")
    both = gemma.pop("rope_parameters")
    old = gemma | {
        "rope_theta": both["full_attention"]["rope_theta"],
        "sliding_window_pattern": 6,
        "rope_local_base_freq": both["sliding_attention"]["rope_theta"],
    }
    del old["layer_types"]
    a, b = decoder_of(old, "config.json"), decoder_of(config_of("gemma3"), "config.json")
    assert a.layers == b.layers and all((x.inv_freq == y.inv_freq).all() for x, y in zip(a.ropes, b.ropes))


def test_long_rope_takes_its_factors_from_the_declared_capacity_and_says_so():
    config = config_of("phi3-long")
    short, long = decoder_of(config, "config.json", 64).ropes[0], decoder_of(config, "config.json", 65).ropes[0]
    assert "short factors" in short.note and "long factors" in long.note and "--max-seq 64" in long.note
    assert short.inv_freq[1] / long.inv_freq[1] == pytest.approx(1.5 / 1.1)
    assert short.scaling == long.scaling > 1


def test_more_than_the_model_was_trained_for_is_refused():
    with pytest.raises(UserError, match="--max-seq 257 should be from 1 to the model's max_position_embeddings, 256"):
        decoder_of(config_of("qwen3"), "config.json", 257)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (
            "llama-gqa-tied",
            {"num_hidden_layers": 2**31 - 1},
            "num_hidden_layers should be a positive integer up to 10000",
        ),
        ("mistral", {"num_hidden_layers": 10**8}, "num_hidden_layers"),
        ("qwen3", {"head_dim": 10**8}, "head_dim"),
        ("qwen3", {"architectures": [["Qwen3ForCausalLM"]]}, "is not supported"),
        ("llama-gqa-tied", {"rope_parameters": {"rope_type": ["default"]}}, "rope_type"),
        ("llama-gqa-tied", {"rope_parameters": {"rope_theta": 1.0, "rope_type": "default"}}, "rope_theta"),
        ("llama-gqa-tied", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama-gqa-tied", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "both given"),
        ("llama-gqa-tied", {"rope_theta": 77.0}, "rope_theta should be one number"),
        ("llama-rope-linear", {"rope_parameters": {"rope_type": "linear", "factor": 1e-300}}, "positive and finite"),
        ("phi3", {"full_attn_mod": 2}, "full_attn_mod is 2"),
        ("mistral", {"rms_norm_eps": None}, "rms_norm_eps is missing"),
    ],
)
def test_numbers_that_would_fill_the_memory_or_make_no_frequencies(name, change, said):
    with pytest.raises(UserError, match=said):
        decoder_of(config_of(name) | change, "config.json")


def test_llama3_factors_without_a_ramp_between_them_are_refused():
    config = config_of("llama-rope-llama3")
    config["rope_parameters"] |= {"high_freq_factor": 1.0}
    with pytest.raises(UserError, match="high_freq_factor = 1.0 should be more than"):
        decoder_of(config, "config.json")


def test_mistral_must_say_whether_it_has_a_window():
    config = config_of("mistral")
    del config["sliding_window"]
    with pytest.raises(UserError, match="sliding_window is missing"):
        decoder_of(config, "config.json")


@pytest.mark.parametrize("max_seq", [0, -5])
def test_a_capacity_that_is_none_is_refused(max_seq):
    with pytest.raises(UserError, match=f"--max-seq {max_seq} should be from 1"):
        decoder_of(config_of("qwen3"), "config.json", max_seq)
