"""Architecture families: one short file each, with only what makes it differ."""

from collections.abc import Iterable

from llmtrt.errors import UserError
from llmtrt.models import gemma3, llama, mistral, phi3, qwen2, qwen3
from llmtrt.models.config import ConfigReader
from llmtrt.models.decoder import Decoder

FAMILIES = {name: family for family in (llama, mistral, qwen2, qwen3, phi3, gemma3) for name in family.ARCHITECTURES}


def decoder_of(config: dict, where: str, max_seq: int | None = None, ignore: Iterable[str] = ()) -> Decoder:
    """The Decoder that the config.json content ``config`` describes.

    ``max_seq``: the declared capacity in tokens, max_position_embeddings if None. ``ignore``: fields that the user knows
    to be of no consequence. Raises UserError for an architecture or a field that is not implemented, naming it.
    """
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else None
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise UserError(
            f"{where}: the architecture {architecture!r} is not supported: llmtrt has {', '.join(FAMILIES)}"
        )
    reader = ConfigReader(config, where, ignore)
    decoder = FAMILIES[architecture].read(reader, max_seq)
    reader.finish()
    return decoder
