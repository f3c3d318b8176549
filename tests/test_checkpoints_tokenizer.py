"""The tokenizer that a checkpoint writes: copied from a folder, or made of GGUF metadata as its original was."""

import json
import shutil
from pathlib import Path

import ggufs
import pytest
import samples
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from llmtrt.checkpoints import open_checkpoint
from llmtrt.checkpoints.gguf_tokenizer import write_gguf_tokenizer
from llmtrt.checkpoints.tokenizer_files import copy_tokenizer
from llmtrt.errors import UserError

ODD = (
    "  hi\n\n\n\t\tx = 12345;  1 22 333 4444 na\u00efve \u00dcn\u00efcode \u4f60\u597d\u4e16 \U0001f642\u200d "
    "\u00a0nbsp "
    "don't WE'LL I'M <b>bold</b> a/b/c \r\n\r\n McDonald's iPhone5 $3.50 a+b=c  end   "
)


def texts() -> list[str]:
    names = ("wikitext2-test.txt", "code-sample.txt", "tinyshakespeare.txt")
    return [ODD] + [samples.data(name).read_text(encoding="utf-8")[:100_000] for name in names]


def written(metadata: dict, folder: Path) -> tuple[Tokenizer, dict]:
    folder.mkdir(exist_ok=True)
    write_gguf_tokenizer(Path("m.gguf"), metadata, folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json")), json.loads(
        (folder / "tokenizer_config.json").read_text()
    )


def metadata_of(tokenizer: Tokenizer, pre: str) -> dict:
    """What llama.cpp's converter writes of a byte-level tokenizer."""
    state = json.loads(tokenizer.to_str())
    special = {token["id"]: 3 if token["special"] else 4 for token in state["added_tokens"]}
    tokens = [tokenizer.id_to_token(index) for index in range(tokenizer.get_vocab_size())]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [special.get(index, 1) for index in range(len(tokens))],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in state["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


def trained(split: pre_tokenizers.PreTokenizer, normalizer=None, ignore_merges: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<|begin|>", "<|end|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_tokens(["<think>"])
    return tokenizer


def byte_level(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe", "dbrx", "tekken", "gpt-4o"])
def test_byte_level_vocabularies(tmp_path, pre):
    """References: the tokenizers library's own GPT-2 and digit rules, transformers' table of the other families'."""
    whole_word = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre == "gpt-2":
        original = trained(whole_word)
    elif pre == "smollm":
        original = trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole_word]))
    else:
        pytest.importorskip("transformers")
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

        original = trained(
            byte_level(GGUF_PRE_TOKENIZER_SPLITS[pre]),
            normalizers.NFC() if pre == "qwen2" else None,
            ignore_merges=pre in ("llama-bpe", "tekken"),
        )
    made, config = written(metadata_of(original, pre), tmp_path / "t")
    assert config["add_bos_token"] == (pre in ("llama-bpe", "tekken"))
    for text in [*texts(), "<|begin|>a <think>b</think> <|end|>", "e\u0301"]:
        ids = original.encode(text).ids
        assert made.encode(text, add_special_tokens=False).ids == ids
        assert made.encode(text).ids == [0] * config["add_bos_token"] + ids
        assert made.decode(ids) == original.decode(ids)


def test_the_pre_tokenizer_called_default(tmp_path):
    """llama.cpp's own: runs of punctuation alone, then GPT-2's rule, then runs of digits, in threes."""
    made, _ = written(metadata_of(trained(byte_level(r"\s+")), "default"), tmp_path / "t")
    pieces = [piece for piece, _ in made.pre_tokenizer.pre_tokenize_str("Hi there!! a+b 1234567 x42")]
    assert pieces == ["Hi", "Ġthere", "!!", "Ġa", "+", "b", "Ġ", "123", "456", "7", "Ġx", "42"]


def spm_metadata(folder: Path) -> dict:
    """stories260k's SentencePiece vocabulary as llama.cpp's converter stores it; scores fall as its merges rank."""
    state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in state["model"]["merges"]]
    rank = {}
    for index, merge in enumerate(merges):
        rank.setdefault("".join(merge), -float(index))
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
    types = [kinds.get(token, 6 if token.startswith("<0x") else 1) for token in tokens]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [rank.get(token, -1e6) for token in tokens],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def test_sentencepiece_vocabulary(tmp_path):
    original = Tokenizer.from_file(str(samples.stories260k() / "tokenizer.json"))
    made, config = written(spm_metadata(samples.stories260k()), tmp_path / "t")
    assert config["add_bos_token"] and config["bos_token"] == "<s>"
    for text in [*texts(), "<s>a</s> b", ""]:
        ids = original.encode(text).ids
        assert made.encode(text).ids == ids
        assert made.decode(ids) == original.decode(ids)
    assert any(made.id_to_token(index).startswith("<0x") for index in made.encode(ODD).ids)


def test_sentencepiece_without_prefix_and_with_user_tokens(tmp_path):
    """Gemma's way: no space before the text, runs of spaces and newlines are tokens of their own."""
    metadata = spm_metadata(samples.stories260k()) | {"tokenizer.ggml.add_space_prefix": False}
    base, _ = written(metadata, tmp_path / "a")
    for key, values in (("tokens", ["  ", "\n\n"]), ("token_type", [4, 4]), ("scores", [-1000.0, -1000.0])):
        metadata[f"tokenizer.ggml.{key}"] = metadata[f"tokenizer.ggml.{key}"] + values
    made, _ = written(metadata, tmp_path / "b")
    text = "once  upon\n\na time"
    plain = [base.encode(part, add_special_tokens=False).ids for part in ("once", "upon", "a time")]
    assert made.encode(text, add_special_tokens=False).ids == [*plain[0], 512, *plain[1], 513, *plain[2]]
    assert made.decode(made.encode(text).ids) == text
    assert base.encode("once", add_special_tokens=False).tokens[0][0] == "o"


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (True, False), (False, True), (False, False)])
def test_the_file_says_what_is_put_around_a_text(tmp_path, bos, eos):
    metadata = spm_metadata(samples.stories260k())
    made, config = written(
        metadata | {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}, tmp_path / "t"
    )
    bare = made.encode("once", add_special_tokens=False).ids
    assert made.encode("once").ids == [1] * bos + bare + [2] * eos
    assert (config["add_bos_token"], config["add_eos_token"]) == (bos, eos)


def test_special_flags_and_phi3_spaces(tmp_path):
    metadata = spm_metadata(samples.stories260k())
    for key, values in (("tokens", ["<|end|>", "<think>"]), ("token_type", [3, 4]), ("scores", [-1000.0, -1000.0])):
        metadata[f"tokenizer.ggml.{key}"] = metadata[f"tokenizer.ggml.{key}"] + values
    llama, _ = written(metadata, tmp_path / "a")
    added = llama.get_added_tokens_decoder()
    assert {added[index].content for index in added if added[index].special} == {"<unk>", "<s>", "</s>", "<|end|>"}
    assert llama.decode([513, 512], skip_special_tokens=True) == "<think>"
    phi, _ = written(metadata | {"general.architecture": "phi3"}, tmp_path / "b")
    assert llama.encode("<|end|>\na").ids != phi.encode("<|end|>\na").ids == phi.encode("<|end|>a").ids


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pre": "jais"}, "pre-tokenizer 'jais'"),
        ({"pre": None}, "names no tokenizer.ggml.pre"),
        ({"model": "rwkv"}, "tokenizer 'rwkv'"),
        ({"model": "llama"}, "tokenizer.ggml.scores should be"),
        ({"token_type": [1, 2]}, "tokenizer.ggml.token_type should be"),
        ({"tokens": None}, "tokenizer.ggml.tokens should be"),
        ({"merges": None}, "tokenizer.ggml.merges should be"),
        ({"merges": ["a"]}, "the merge 'a'"),
        ({"merges": ["a nonsense"]}, "the merge 'a nonsense'"),
        ({"bos_token_id": 10**6}, "tokenizer.ggml.bos_token_id = 1000000"),
    ],
)
def test_metadata_that_contradict_each_other(tmp_path, change, said):
    metadata = metadata_of(trained(byte_level(r"\s+")), "gpt-2") | {f"tokenizer.ggml.{k}": v for k, v in change.items()}
    with pytest.raises(UserError) as caught:
        written(metadata, tmp_path / "t")
    assert said in str(caught.value) and "m.gguf" in str(caught.value)


def test_a_file_without_tokenizer_writes_none(tmp_path):
    path = ggufs.write(tmp_path / "m.gguf", "llama", ggufs.weights("llama"))
    (tmp_path / "t").mkdir()
    open_checkpoint(path).write_tokenizer(tmp_path / "t")
    assert not list((tmp_path / "t").iterdir())


def test_a_folders_tokenizer_is_copied(tmp_path):
    source = samples.stories260k()
    (tmp_path / "t").mkdir()
    open_checkpoint(source).write_tokenizer(tmp_path / "t")
    assert (tmp_path / "t" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    copied = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())
    assert copied == json.loads((source / "tokenizer_config.json").read_text())
    assert not (tmp_path / "t" / "chat_template.jinja").exists()


def test_the_chat_template_is_found_wherever_it_lies(tmp_path):
    source = tmp_path / "s"
    source.mkdir()
    shutil.copy(samples.stories260k() / "tokenizer.json", source)

    def template(number: int) -> str:
        (tmp_path / f"t{number}").mkdir()
        copy_tokenizer(source, tmp_path / f"t{number}")
        assert "chat_template" not in json.loads((tmp_path / f"t{number}" / "tokenizer_config.json").read_text())
        return (tmp_path / f"t{number}" / "chat_template.jinja").read_text()

    (source / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": "one"}))
    assert template(1) == "one"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "two"}]
    (source / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": named}))
    assert template(2) == "two"
    (source / "chat_template.json").write_text(json.dumps({"chat_template": "three"}))
    assert template(3) == "three"
    (source / "chat_template.jinja").write_text("four {{ bos_token }}\n")
    assert template(4) == "four {{ bos_token }}\n"


def test_a_folder_with_another_form_of_tokenizer_or_none(tmp_path):
    source, target = tmp_path / "s", tmp_path / "t"
    source.mkdir()
    target.mkdir()
    copy_tokenizer(source, target)
    assert not list(target.iterdir())
    (source / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(
        UserError, match=r"tokenizer.model but no tokenizer.json: make it with `python -c .*save_pretrained"
    ):
        copy_tokenizer(source, target)
    (source / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer.json is not valid JSON"):
        copy_tokenizer(source, target)
