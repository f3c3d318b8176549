"""The tokenizer of a Hugging Face folder, as the package keeps it: tokenizer.json, its config, one chat template."""

import shutil
from pathlib import Path

from llmtrt import files
from llmtrt.errors import UserError

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
FILES = (TOKENIZER, CONFIG, TEMPLATE)
_TEMPLATE_JSON = "chat_template.json"
READ = (TOKENIZER, CONFIG, TEMPLATE, _TEMPLATE_JSON)
_OTHERS = ("tokenizer.model", "vocab.json", "merges.txt", "spiece.model", "tekken.json", CONFIG)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Writes the tokenizer of folder ``source`` into ``target``; nothing where ``source`` has none.

    The chat template is written to chat_template.jinja alone, wherever it came from (chat_template.jinja,
    chat_template.json, or the one called default in tokenizer_config.json). Raises UserError where only another
    form of tokenizer is there than tokenizer.json.
    """
    if not (source / TOKENIZER).is_file():
        if present := [name for name in _OTHERS if (source / name).is_file()]:
            raise UserError(
                f"{source} holds {present[0]} but no {TOKENIZER}: make it with "
                f'`python -c "from transformers import AutoTokenizer as T; '
                f"T.from_pretrained('{source}').save_pretrained('{source}')\"`"
            )
        return
    files.read_json(source / TOKENIZER, limit=256 << 20)
    shutil.copyfile(source / TOKENIZER, target / TOKENIZER)
    config = files.read_json(source / CONFIG) if (source / CONFIG).is_file() else {}
    template = config.pop("chat_template", None)
    if (source / _TEMPLATE_JSON).is_file():
        template = files.read_json(source / _TEMPLATE_JSON).get("chat_template", template)
    if (source / TEMPLATE).is_file():
        try:
            template = (source / TEMPLATE).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {source / TEMPLATE} as UTF-8 text ({error}): download it again") from None
    if isinstance(template, list):  # several, each {"name", "template"}
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    write_side_files(target, config, template)


def write_side_files(target: Path, config: dict, template: object) -> None:
    """Writes tokenizer_config.json and, where ``template`` is a string, chat_template.jinja."""
    if config:
        files.write_json(target / CONFIG, config)
    if isinstance(template, str) and template:
        try:
            (target / TEMPLATE).write_text(template, encoding="utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"the checkpoint's chat template is not text ({error}): fetch the tokenizer again"
            ) from None
