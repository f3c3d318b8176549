"""Chat templates: Jinja from an untrusted file, run in Jinja's sandbox under transformers' conventions."""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from llmtrt.errors import UserError

# A template is a program of the model's; this is what a program raises where the messages are not as it expects.
_PROGRAM_ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class ChatTemplate:
    """A compiled chat template, as https://huggingface.co/docs/transformers/chat_templating documents the conventions.

    ``special_tokens`` (``bos_token``, ``eos_token``, …) are variables of the template. Raises UserError, naming
    ``where``, if ``source`` is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: dict[str, str], where: Path):
        import jinja2
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_generation_tag(), loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self._special_tokens = special_tokens
        self._where = where
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"{where}: the chat template is not valid Jinja ({error})") from None

    def render(self, messages: Sequence[dict], add_generation_prompt: bool = True, **variables: object) -> str:
        """The text of a conversation; ``messages`` are objects with ``role`` and ``content``.

        ``variables`` (``tools``, ``enable_thinking``, …) reach the template. Raises UserError if the messages are
        malformed or the template refuses them.
        """
        if not isinstance(messages, (list, tuple)) or not messages:
            raise UserError("messages should be a list of at least one object with 'role' and 'content'")
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise UserError(f"each message should be an object with 'role' and 'content', but one is {message!r}")
        # The template sees plain data only: JSON's types carry no methods that a template could misuse.
        try:
            plain = json.loads(json.dumps([_without_none(message) for message in messages]))
            variables = json.loads(json.dumps(variables))
        except (TypeError, ValueError) as error:
            raise UserError(f"messages should hold strings, numbers, lists and objects only ({error})") from None
        import jinja2

        defaults = {"tools": None, "documents": None, **self._special_tokens}
        try:
            return self._template.render(
                defaults | variables | {"messages": plain, "add_generation_prompt": add_generation_prompt}
            )
        except (jinja2.TemplateError, *_PROGRAM_ERRORS) as error:
            raise UserError(f"{self._where}: the chat template refuses these messages ({error})") from None


def _without_none(message: dict) -> dict:
    """OpenAI clients send ``tool_calls: null``, which templates take for a value."""
    return {name: value for name, value in message.items() if value is not None}


def _generation_tag() -> type:
    """``{% generation %}…{% endgeneration %}`` marks the assistant's own words for training; here it is no more than
    its body."""
    from jinja2.ext import Extension
    from jinja2.nodes import Scope

    class GenerationTag(Extension):
        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    return GenerationTag


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Jinja's own filter escapes HTML characters."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
