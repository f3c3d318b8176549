"""Perplexity against transformers in float64 and against the figures that the project rests on."""

import math

import numpy as np
import pytest
import samples
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llmtrt import LLM, quantize
from llmtrt.checkpoints import open_checkpoint
from llmtrt.errors import UserError
from llmtrt.evaluate.perplexity import perplexity


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    package = quantize(samples.stories260k(), tmp_path_factory.mktemp("packages") / "fp32", "fp32").package
    with LLM(package.path, threads=1, chunk=50) as llm:
        yield llm


@pytest.fixture(scope="module")
def text():
    return samples.data("tinyshakespeare.txt").read_text()[:6000]


@pytest.mark.parametrize(("context", "tokens"), [(128, None), (100, 1000), (512, 1024), (2, 10)])
def test_against_transformers(llm, text, context, tokens):
    result = perplexity(llm, text, context, tokens)
    ids = torch.tensor(llm.encode(text, special=False)[:tokens])
    windows = ids[: len(ids) // context * context].view(-1, context)
    model = AutoModelForCausalLM.from_pretrained(samples.stories260k()).eval().double()
    with torch.no_grad():
        losses = [model(window[None], labels=window[None]).loss.item() for window in windows]
    assert result["nll"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert result["tokens"] == windows.numel() and result["context"] == context
    assert result["predicted"] == len(windows) * (context - 1)


def test_rows_of_logits_at_a_time_change_nothing(llm, text, monkeypatch):
    whole = perplexity(llm, text, 256, 512)
    monkeypatch.setattr("llmtrt.runtime.llm._LOGITS_BYTES", 7 * 4 * 512)  # seven rows of this vocabulary
    assert max(len(part) for part in llm.logits_chunks(range(100))) == 7
    assert perplexity(llm, text, 256, 512)["nll"] == pytest.approx(whole["nll"], rel=1e-6)


def test_token_ids_are_as_good_as_text(llm, text):
    ids = llm.encode(text, special=False)
    assert perplexity(llm, ids, 128, 256) == perplexity(llm, text, 128, 256)


def test_progress(llm, text):
    seen = []
    perplexity(llm, text, 64, 256, report=lambda done, total, note="": seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_bad_input(llm, text):
    for options, match in [
        ({"context": 1}, "between 2 and 512"),
        ({"context": 513}, "between 2 and 512"),
        ({"context": 64, "tokens": 10**6}, "1000000 were asked for"),
        ({"tokens": 50, "context": 100}, "less than one context"),
    ]:
        with pytest.raises(UserError, match=match):
            perplexity(llm, text, **options)
    with pytest.raises(UserError, match="less than one context"):
        perplexity(llm, "", context=4)
    with pytest.raises(UserError, match="out of range"):
        perplexity(llm, [5, 6, 7, 512], context=4)


def test_smollm2_in_fp16_is_transformers_in_fp32(tmp_path):
    """One window of WikiText-2; the whole protocol's 16,384 tokens gave 22.88 for fp16 (FACTS) and take minutes."""
    checkpoint = open_checkpoint(samples.smollm2_gguf())
    package = quantize(samples.smollm2_gguf(), tmp_path / "fp16", "fp16").package
    with LLM(package.path, accuracy_level=1) as llm:
        ids = llm.encode(samples.data("wikitext2-test.txt").read_text()[:10000], special=False)[:1024]
        result = perplexity(llm, ids)
    fields = {name: value for name, value in checkpoint.config.items() if name != "architectures"}
    model = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    state = {name: torch.tensor(checkpoint.read(name).astype(np.float32)) for name in checkpoint.tensors()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    with torch.no_grad():
        window = torch.tensor([ids])
        expected = math.exp(model(window, labels=window).loss.item())
    assert result["perplexity"] == pytest.approx(expected, rel=0.005)


def test_smollm2_in_int4_keeps_to_the_anchor(tmp_path):
    """FACTS' protocol: round to nearest in blocks of 64 gave 32.49 with modelopt; a wrong rounding or block shows here."""
    package = quantize(samples.smollm2_gguf(), tmp_path / "int4", "int4-g64").package
    with LLM(package.path, accuracy_level=1) as llm:
        result = perplexity(llm, samples.data("wikitext2-test.txt").read_text()[:200_000], tokens=16384)
    assert result["tokens"] == 16384
    assert 31.5 < result["perplexity"] <= 32.8
