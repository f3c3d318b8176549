"""Reading config.json so that nothing in it that matters can be overlooked."""

from collections.abc import Iterable
from typing import Any

from llmtrt.errors import UserError

# Fields that say nothing about what the model computes for one sequence at inference: book-keeping, training, and the
# generation defaults that older versions of transformers wrote here.
BOOKKEEPING = frozenset(
    """_attn_implementation _attn_implementation_autoset _commit_hash _from_model_config _name_or_path architectures
    attention_dropout attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id cache_implementation
    chunk_size_feed_forward diversity_penalty do_sample dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size
    eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing hidden_dropout id2label initializer_range is_decoder is_encoder_decoder is_llama_config label2id
    length_penalty max_length max_new_tokens max_sequence_length min_length model_max_length model_type neftune_noise_alpha
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
    output_scores pad_token_id prefix pretraining_tp problem_type quantization_config remove_invalid_values
    repetition_penalty resid_pdrop return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params
    temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version typical_p unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache""".split()
)
_REQUIRED = object()


class ConfigReader:
    """Hands out the fields of a config.json and, at the end, refuses the ones that nobody asked for.

    A field counts as understood once it was taken, if it is bookkeeping, if the user named it in ``ignore``, or if its
    value is null or false: the field's way to say that something is off. Every other one could change the mathematics.
    """

    def __init__(self, fields: dict[str, Any], where: str, ignore: Iterable[str] = ()):
        self._fields, self._where, self._ignore = fields, where, frozenset(ignore)
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return self._fields.get(name) is not None

    def states(self, name: str) -> bool:
        """Whether the field is there at all, be it null."""
        return name in self._fields

    def raw(self, name: str) -> Any:
        self._taken.add(name)
        return self._fields.get(name)

    def count(self, name: str, default: Any = _REQUIRED, limit: int = (1 << 31) - 1) -> int:
        """A positive integer up to ``limit``."""
        said = "a positive integer" + (f" up to {limit}" if limit < (1 << 31) - 1 else "")
        return self._typed(name, default, lambda v: type(v) is int and 0 < v <= limit, said)

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        """A positive number."""
        return self._typed(name, default, lambda v: type(v) in (int, float) and 0 < v < 1e30, "a positive number")

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        return self._typed(name, default, lambda v: type(v) is bool, "true or false")

    def numbers(self, name: str, length: int) -> list[float]:
        """A list of ``length`` positive numbers."""
        return self._typed(
            name,
            _REQUIRED,
            lambda v: isinstance(v, list) and len(v) == length and all(type(x) in (int, float) and x > 0 for x in v),
            f"a list of {length} positive numbers",
        )

    def names(self, name: str, length: int, allowed: tuple[str, ...]) -> list[str] | None:
        """A list of ``length`` of the ``allowed`` words, or None where the field is absent."""
        return self._typed(
            name,
            None,
            lambda v: isinstance(v, list) and len(v) == length and all(x in allowed for x in v),
            f"a list of {length} words out of {', '.join(allowed)}",
        )

    def only(self, name: str, *allowed: Any) -> Any:
        """The field's value, which must be absent or one of ``allowed``; the first of them where it is absent."""
        value = self.raw(name)
        if value is None:
            return allowed[0]
        if value not in allowed:
            said = " or ".join(map(repr, allowed))
            raise UserError(f"{self._where}: {name} is {value!r}, which llmtrt does not implement: it supports {said}")
        return value

    def part(self, name: str) -> "ConfigReader | None":
        """A reader of the object in this field, None where it is absent."""
        value = self._typed(name, None, lambda v: isinstance(v, dict), "an object")
        return None if value is None else ConfigReader(value, f"{self._where}: {name}", self._ignore)

    def finish(self) -> None:
        """Raises UserError naming the fields of consequence that were not taken."""
        left = sorted(
            name
            for name, value in self._fields.items()
            if name not in self._taken | BOOKKEEPING | self._ignore and value is not None and value is not False
        )
        if left:
            said = ", ".join(f"{name} = {self._fields[name]!r}"[:80] for name in left[:5])
            raise UserError(
                f"{self._where}: llmtrt does not implement {said}: if you know that it does not change what the model "
                f"computes, pass --ignore-field {left[0]}"
            )

    def refuse(self, reason: str) -> UserError:
        return UserError(f"{self._where}: {reason}")

    def _typed(self, name: str, default: Any, valid, wanted: str) -> Any:
        value = self.raw(name)
        if value is None and default is not _REQUIRED:
            return default
        if value is None:
            raise UserError(f"{self._where}: the field {name} is missing: expected {wanted}")
        if not valid(value):
            raise UserError(f"{self._where}: {name} should be {wanted}, but is {str(value)[:80]!r}")
        return value
