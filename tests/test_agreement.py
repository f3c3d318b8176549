"""KL divergence and top-1 agreement against NumPy in float64 on transformers' logits."""

import json

import numpy as np
import pytest
import samples
import torch
from transformers import AutoModelForCausalLM

from llmtrt.cli.main import main
from llmtrt.errors import UserError
from llmtrt.evaluate.agreement import agreement
from llmtrt.quantization.pipeline import quantize
from llmtrt.runtime.llm import LLM


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    return [quantize(samples.stories260k(), folder / name, name).package.path for name in ("fp32", "int4-g32")]


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )


def test_numbers_are_those_of_transformers(packages):
    with LLM(packages[0]) as reference, LLM(packages[1], accuracy_level=1) as llm:
        ids = np.random.default_rng(0).integers(3, 500, 230).tolist()
        found = agreement(llm, reference, ids, 64)
        ours = np.concatenate([llm.logits(ids[at : at + 64]) for at in (0, 64, 128)])
        assert agreement(llm, llm, ids, 64) == {"kl_divergence": 0.0, "top1_agreement": 1.0}
    model = AutoModelForCausalLM.from_pretrained(samples.stories260k(), dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = np.concatenate([model(torch.tensor([ids[at : at + 64]])).logits[0].numpy() for at in (0, 64, 128)])
    p, q = log_probabilities(theirs), log_probabilities(ours)
    assert found["kl_divergence"] == pytest.approx((np.exp(p) * (p - q)).sum(1).mean(), rel=1e-3)
    assert found["top1_agreement"] == pytest.approx((p.argmax(1) == q.argmax(1)).mean(), abs=0.006)
    assert 0.001 < found["kl_divergence"] < 0.3 and 0.5 < found["top1_agreement"] < 1


def test_models_of_other_vocabularies_are_refused(packages, tmp_path):
    from families import save

    other = quantize(save("qwen3", tmp_path / "checkpoint"), tmp_path / "package", "fp32").package
    with LLM(packages[0]) as llm, LLM(other.path) as reference:
        with pytest.raises(UserError, match="512 and 97 tokens: compare a model with its own checkpoint"):
            agreement(llm, reference, [5] * 16, 8)


def test_the_command_compares_with_a_checkpoint_and_keeps_it(packages, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time, there was a little girl named Lily. She loved to play outside. " * 20)
    command = ["eval", str(packages[1]), "--text", str(text), "--context", "64", "--tokens", "256", "--save"]
    assert main([*command, "--against", str(samples.stories260k()), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert main([*command, "--against", str(packages[0])]) == 0
    assert f"mean KL divergence {said['kl_divergence']:.4f} nats" in capsys.readouterr().out
    (kept,) = json.loads((packages[1] / "quality.json").read_text())["measured"]
    assert kept["kl_divergence"] == round(said["kl_divergence"], 4) and 0 < kept["top1_agreement"] <= 1
