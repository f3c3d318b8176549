"""The checkpoint's own tokenizer, as the package carries it."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from llmtrt import files
from llmtrt.errors import UserError
from llmtrt.runtime.chat import ChatTemplate

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"


class Tokenizer:
    """Text to token ids and back for the package or checkpoint in ``folder``.

    What is added around a text (BOS, EOS) is what ``tokenizer.json``'s post-processor says, as in transformers, which
    disregards ``add_bos_token`` where that file is there. Raises UserError if a file is missing or is not a tokenizer.
    """

    def __init__(self, folder: Path, bos_token_id: int | None = None):
        import tokenizers

        self.folder = folder
        path = folder / TOKENIZER
        if not path.is_file():
            raise UserError(f"{path} is missing: this model takes prompts as lists of token ids only")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001 - the library raises no narrower type
            raise UserError(
                f"{path} is not a tokenizer that tokenizers {tokenizers.__version__} can read ({error})"
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._bos = bos_token_id
        self.special_ids = frozenset(
            index for index, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
        )

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of ``text``; ``special`` adds what the tokenizer puts around a text, but no BOS to one that has it.

        Special tokens that the text spells out, as a chat template does, become those tokens. Raises UserError where it is
        no Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text is not valid Unicode at {text[error.start : error.end]!r}, as a command line is that is not in "
                "UTF-8: give it in UTF-8"
            ) from None
        ids = self._tokenizer.encode(text, add_special_tokens=special).ids
        twice = special and self._bos is not None and ids[:2] == [self._bos, self._bos]
        if twice and self._tokenizer.encode(text, add_special_tokens=False).ids[0] == self._bos:
            return ids[1:]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def render_chat(self, messages: Sequence[dict], **variables: object) -> str:
        """``messages`` in the model's own chat format, ending where the assistant's answer starts.

        Encode it with ``special=False``: the template writes BOS itself. Raises UserError as ``ChatTemplate.render``.
        """
        return self.chat_template.render(messages, **variables)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The model's own; UserError where it has none, and where it is none."""
        config = files.read_json(path) if (path := self.folder / TOKENIZER_CONFIG).is_file() else {}
        template = self.folder / CHAT_TEMPLATE
        try:
            source = (
                template.read_text(encoding="utf-8")
                if template.is_file()
                else _template_of(config.get("chat_template"))
            )
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {template} ({error})") from None
        if source is None:
            raise UserError(
                f"{self.folder} has no chat template: give the whole prompt as text (`llmtrt generate -p`), not messages"
            )
        return ChatTemplate(source, _special_tokens(config), template if template.is_file() else path)


def _template_of(value: object) -> str | None:
    """tokenizer_config.json holds one template, or a list of named ones of which "default" is for plain chat."""
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _special_tokens(config: dict) -> dict[str, str]:
    """``bos_token`` and the like, each a string or an object with ``content``."""
    contents = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in config.items()
        if name.endswith("_token")
    }
    return {name: value for name, value in contents.items() if isinstance(value, str)}
