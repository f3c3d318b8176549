"""How a request wants its tokens chosen, and when it wants to end."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from llmtrt.errors import UserError

MAX_LOGPROBS = 1024
_LARGEST = 1e38  # of fp32, which the device has them in


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request, with transformers' meaning; the order is penalty, temperature, top_k, top_p,
    min_p.

    ``max_tokens``: the most tokens to generate (256, as mlx-lm has it; None: until the context is full).
    ``temperature``: 0 takes the most likely token (greedy); otherwise logits are divided by it.
    ``top_k``: keeps the k most likely tokens; 0 keeps all.
    ``top_p``: keeps the smallest set of most likely tokens whose probability reaches it, at least one; 1 keeps all.
    ``min_p``: keeps tokens at least ``min_p`` times as probable as the most likely one; 0 keeps all.
    ``repetition_penalty``: logits of tokens in the prompt or generated so far are divided by it if positive and
    multiplied by it if negative (Keskar et al. 2019, arXiv:1909.05858); greedy choice sees it too; 1 is none, 0.001
    the least.
    ``seed``: equal seeds give equal tokens, alone and in any batch, where the runtime's logits are equal; None: a
    random one.
    ``stop``: strings that end the request; they are not part of the text.
    ``stop_token_ids``: further ids that end it, as the model's own EOS ids do; their text is not part of the text.
    ``ignore_eos``: the model's EOS ids end nothing; ``stop`` and ``stop_token_ids`` still do.
    ``logprobs``: for each generated token, its log-probability and those of that many most likely tokens, taken from
    the model's own logits (before penalty and temperature); None: none at all.

    Raises UserError naming the parameter that is out of range.
    """

    max_tokens: int | None = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple, set, frozenset)):
                raise UserError(f"{name} should be a list, but is {value!r}")
            object.__setattr__(self, name, tuple(value))
        check_integer("max_tokens", self.max_tokens, 1, optional=True)
        check_integer("top_k", self.top_k, 0)
        check_integer("seed", self.seed, 0, (1 << 64) - 1, optional=True)
        check_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS, optional=True)
        _check_real("temperature", self.temperature, lambda value: value >= 0, "0 or more")
        _check_real("top_p", self.top_p, lambda value: 0 < value <= 1, "more than 0 and at most 1")
        _check_real("min_p", self.min_p, lambda value: 0 <= value <= 1, "between 0 and 1")
        _check_real("repetition_penalty", self.repetition_penalty, lambda value: value >= 1e-3, "of at least 0.001")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise UserError(f"stop should hold non-empty strings, but holds {text!r}")
        for token in self.stop_token_ids:
            check_integer("each of stop_token_ids", token, 0)
        if not isinstance(self.ignore_eos, bool):
            raise UserError(f"ignore_eos should be true or false, but is {self.ignore_eos!r}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @classmethod
    def from_generation(cls, generation: dict, **overrides: object) -> "SamplingParams":
        """The parameters that transformers' ``generate`` would take from a generation_config.json, then ``overrides``.

        ``do_sample`` false or absent means greedy whatever the file's temperature says, unless ``overrides`` has a
        temperature above 0. Where tokens are sampled, a temperature that the file lacks is 1 and a top_k that it lacks
        is 50, as in transformers. ``max_new_tokens`` becomes ``max_tokens``. Overrides that are None change nothing.

        Raises UserError for a value out of range and for an override that is no parameter.
        """
        overrides = {name: value for name, value in overrides.items() if value is not None}
        if unknown := overrides.keys() - cls.__dataclass_fields__.keys():
            raise UserError(f"{', '.join(sorted(unknown))} is no sampling parameter: see SamplingParams")
        asked = overrides.get("temperature")
        sampled = generation.get("do_sample") is True if asked is None else asked != 0
        defaults = {
            "max_tokens": generation.get("max_new_tokens"),
            "repetition_penalty": generation.get("repetition_penalty"),
        }
        if sampled:
            defaults |= {"temperature": 1.0, "top_k": 50}
            defaults |= {
                name: generation[name]
                for name in ("temperature", "top_k", "top_p", "min_p")
                if generation.get(name) is not None
            }
            if defaults["temperature"] == 0 and asked is None:
                sampled = False
        defaults = {name: value for name, value in defaults.items() if value is not None and name not in overrides}
        try:
            cls(**defaults)
        except UserError as error:
            raise UserError(f"generation_config.json of the model: {error}") from None
        return cls(**defaults, **overrides)


def check_integer(name: str, value: object, least: int, most: int | None = None, optional: bool = False) -> None:
    """UserError unless ``value`` is an integer from ``least`` to ``most``; ``optional`` allows None."""
    if value is None and optional:
        return
    if (
        not isinstance(value, Integral)
        or isinstance(value, bool)
        or value < least
        or (most is not None and value > most)
    ):
        limits = f"of at least {least}" if most is None else f"between {least} and {most}"
        raise UserError(f"{name} should be an integer {limits}, but is {value!r}")


def _check_real(name: str, value: object, allowed, limits: str) -> None:
    if not isinstance(value, Real) or isinstance(value, bool) or not abs(value) <= _LARGEST or not allowed(value):
        raise UserError(f"{name} should be a number {limits}, but is {value!r}")
