"""tokenizer.json from a GGUF file's metadata: byte-level BPE ("gpt2") and SentencePiece BPE ("llama")."""

from pathlib import Path
from typing import TYPE_CHECKING

from llmtrt.checkpoints import tokenizer_files
from llmtrt.checkpoints.pretokenizers import PRETOKENIZERS, Pretokenizer
from llmtrt.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # gguf.TokenType; 6 is a byte of the fallback
_SPACE = "▁"


def write_gguf_tokenizer(path: Path, metadata: dict, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja of the GGUF file ``path`` into ``folder``.

    The post-processor of tokenizer.json adds BOS and EOS where the metadata (or llama.cpp's rule for its kind of
    tokenizer) says so. Nothing is written where the file has no tokenizer. Raises UserError naming a kind of tokenizer
    or pre-tokenizer that is not known, or metadata that contradict each other.
    """
    kind = metadata.get("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return
    tokens = _list(path, metadata, "tokens", str)
    types = _list(path, metadata, "token_type", int, len(tokens))
    if len(set(tokens)) != len(tokens):
        raise UserError(f"{path}: tokenizer.ggml.tokens names a token twice: download it again")
    special = {}
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")):
        if (index := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            if not isinstance(index, int) or not 0 <= index < len(tokens):
                raise UserError(f"{path}: tokenizer.ggml.{key}_token_id = {index} is none of its {len(tokens)} tokens")
            special[name] = tokens[index]
    if kind == "gpt2":
        split = _pretokenizer(path, metadata.get("tokenizer.ggml.pre"))
        tokenizer, adds_bos = _byte_level(path, metadata, tokens, types, split), split.adds_bos
    elif kind == "llama":
        tokenizer, adds_bos = _sentencepiece(path, metadata, tokens, types, special.get("unk_token")), True
    else:
        raise UserError(f"{path}: the tokenizer {kind!r} is not supported: llmtrt reads gpt2 and llama")
    _add_tokens(tokenizer, metadata, tokens, types, special)
    config = special | {
        "add_bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", adds_bos)) and "bos_token" in special,
        "add_eos_token": bool(metadata.get("tokenizer.ggml.add_eos_token", False)) and "eos_token" in special,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _frame(tokenizer, config)
    tokenizer.save(str(folder / tokenizer_files.TOKENIZER), pretty=False)
    tokenizer_files.write_side_files(folder, config, metadata.get("tokenizer.chat_template"))


def _list(path: Path, metadata: dict, key: str, kind: type, length: int | None = None) -> list:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list) or not value or type(value[0]) is not kind or length not in (None, len(value)):
        wanted = f"a list of {kind.__name__}" + (f" as long as the {length} tokens" if length else "")
        raise UserError(f"{path}: tokenizer.ggml.{key} should be {wanted}: convert the model to GGUF again")
    return value


def _pretokenizer(path: Path, name: str | None) -> Pretokenizer:
    if name is None:
        raise UserError(f"{path} names no tokenizer.ggml.pre: convert the model again with a llama.cpp of this age")
    if name not in PRETOKENIZERS:
        raise UserError(f"{path}: the pre-tokenizer {name!r} is not supported: llmtrt has {', '.join(PRETOKENIZERS)}")
    return PRETOKENIZERS[name]


def _byte_level(path: Path, metadata: dict, tokens: list[str], types: list[int], split: Pretokenizer) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    merges = [tuple(merge.split(" ")) for merge in _list(path, metadata, "merges", str)]
    vocab = {token: index for index, (token, kind) in enumerate(zip(tokens, types)) if kind != _UNUSED}
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocab.keys():
            raise UserError(f"{path}: the merge {' '.join(merge)!r} does not make a token of two: download it again")
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=split.ignore_merges))
    if split.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split.patterns]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(path: Path, metadata: dict, tokens: list[str], types: list[int], unknown: str | None) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = _list(path, metadata, "scores", float, len(tokens))
    vocab = {token: index for index, token in enumerate(tokens)}
    pieces = {token: index for index, (token, kind) in enumerate(zip(tokens, types)) if kind == _NORMAL}
    tokenizer = Tokenizer(
        models.BPE(vocab, _merges(pieces, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefixed = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefixed else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefixed else []))
    return tokenizer


def _merges(pieces: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """The merges that SentencePiece makes of scored ``pieces``: at each step the pair whose union scores highest
    (https://arxiv.org/abs/1808.06226), so every split of a piece into two pieces ranks by the piece's score."""
    found = []
    for piece, index in pieces.items():
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        found += [(-scores[index], index, split) for split in splits if split[0] in pieces and split[1] in pieces]
    found.sort(key=lambda item: item[:2])
    return [split for _, _, split in found]


def _add_tokens(tokenizer: "Tokenizer", metadata: dict, tokens: list[str], types: list[int], special: dict) -> None:
    from tokenizers import AddedToken

    # Phi-3's own tokenizer drops the whitespace after its special tokens; GGUF has no field for that.
    strips = metadata.get("general.architecture") == "phi3" and metadata["tokenizer.ggml.model"] == "llama"
    plain = {"<unk>", "<s>", "<|endoftext|>"}
    added = [
        AddedToken(token, normalized=False, special=kind != _USER_DEFINED or token in special.values(),
                   rstrip=strips and kind == _CONTROL and token not in plain)
        for token, kind in zip(tokens, types)
        if kind in (_CONTROL, _UNKNOWN, _USER_DEFINED) or token in special.values()
    ]  # fmt: skip
    tokenizer.add_tokens(added)


def _frame(tokenizer: "Tokenizer", config: dict) -> None:
    """Lets the post-processor put BOS before and EOS after a text, where the config says so."""
    from tokenizers import processors

    before = [config["bos_token"]] if config["add_bos_token"] else []
    after = [config["eos_token"]] if config["add_eos_token"] else []
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, "$B:1", *(f"{token}:1" for token in after)],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys([*before, *after])],
        )
