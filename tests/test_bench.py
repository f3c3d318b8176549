"""`llmtrt bench`: what it says of times that are known, of what a step reads, and of transformers."""

import json
import time

import families
import numpy as np
import pytest
import samples
import test_scheduler

from llmtrt.cli.main import main
from llmtrt.errors import UserError
from llmtrt.evaluate import bandwidth
from llmtrt.evaluate.peer import Transformers
from llmtrt.evaluate.speed import Case, cases, measure, weight_bytes
from llmtrt.quantization.pipeline import quantize


@pytest.fixture
def ticking(monkeypatch):
    """A clock that moves by one second a step, and only then."""
    clock, step = [100.0], test_scheduler.FakeSession.step

    def timed(*arguments):
        clock[0] += 1
        return step(*arguments)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(test_scheduler.FakeSession, "step", timed)


def test_times_are_those_of_the_steps(tmp_path, ticking):
    llm = test_scheduler.make(tmp_path, chunk=7)
    speed = measure(llm, Case(prompt=15, tokens=5), runs=2, weights=1000)
    assert (speed.ttft, speed.gap_p50, speed.gap_p99, speed.tokens_per_second) == (3, 1, 1, 1)
    # One layer's key and value of one head of eight numbers, in fp32, for 15 + 2 rows.
    assert speed.bytes_per_second == 1000 + 17 * 2 * 8 * 4


def test_a_batch_counts_all_its_tokens(tmp_path, ticking):
    llm = test_scheduler.make(tmp_path, chunk=40, max_seq=100)
    speed = measure(llm, Case(prompt=10, tokens=6, batch=4), runs=1, weights=1000)
    assert (speed.ttft, speed.gap_p50, speed.tokens_per_second) == (1, 1, 4)
    assert speed.bytes_per_second == 1000 + 4 * 13 * 64  # a step reads the weights once for all


def test_a_context_is_in_the_cache_when_the_prompt_comes(tmp_path, ticking):
    llm = test_scheduler.make(tmp_path, chunk=10, max_seq=100)
    assert measure(llm, Case(prompt=10, tokens=3, context=50), runs=2).ttft == 1
    assert measure(llm, Case(prompt=60, tokens=3), runs=2).ttft == 6
    cold = test_scheduler.make(tmp_path, chunk=10, max_seq=100, reuse_prefixes=False)
    assert measure(cold, Case(prompt=10, tokens=3, context=50), runs=2).ttft == 6


@pytest.mark.parametrize(
    "case, match",
    [
        ({"prompt": 0}, "--prompt should be an integer of at least 1, but is 0"),
        ({"tokens": 1}, "--tokens should be an integer of at least 2"),
        ({"context": -1}, "--context should be"),
        ({"batch": 5}, "--batch 5 is more than the 4 sequences"),
        ({"prompt": 60, "tokens": 5}, r"65 tokens .* are more than the model's 64"),
    ],
)
def test_what_cannot_be_measured_is_told(tmp_path, case, match):
    with pytest.raises(UserError, match=match):
        measure(test_scheduler.make(tmp_path), Case(**case))


def test_every_batch_size_is_measured_with_every_context():
    assert cases(5, 6, [1, 4], [0, 9]) == [Case(5, 6, 1), Case(5, 6, 4), Case(5, 6, 1, 9), Case(5, 6, 4, 9)]


def test_of_an_embedding_that_is_no_head_only_rows_are_read(tmp_path):
    for family, tied in (("qwen2-tied", True), ("mistral", False)):
        quantize(families.save(family, tmp_path / family), tmp_path / f"{family}-package", "fp16")
        size = (tmp_path / f"{family}-package" / "model.onnx.data").stat().st_size
        config = json.loads((tmp_path / family / "config.json").read_text())
        assert bool(config.get("tie_word_embeddings")) == tied
        table = 0 if tied else 2 * config["vocab_size"] * config["hidden_size"]
        assert weight_bytes(tmp_path / f"{family}-package") == size - table


def test_a_copy_counts_what_it_reads_and_what_it_writes(monkeypatch):
    monkeypatch.setattr(bandwidth, "_HOST", 1 << 20)
    ticks = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    assert bandwidth.host_bandwidth(2) == 2 << 20  # each copy takes a second of this clock


def test_transformers_gives_the_tokens_of_the_same_weights():
    import torch
    from transformers import AutoModelForCausalLM

    peer, ids = Transformers.read(samples.stories260k()), torch.tensor([[1, 5, 9, 30]])
    with torch.no_grad():
        ours = peer._model(ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(samples.stories260k()).eval()(ids).logits
    assert np.abs(ours - theirs).max() <= 1e-6 * np.ptp(theirs.numpy())
    speed = peer.measure(Case(prompt=8, tokens=4, batch=2), runs=1)
    assert speed.ttft > 0 and speed.tokens_per_second > 0 and speed.bytes_per_second is None and not peer.gpu_bytes()


def test_bench_prints_a_table_and_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bandwidth, "_HOST", 1 << 20)
    quantize(samples.stories260k(), tmp_path / "package", "int4")
    asked = ["bench", str(tmp_path / "package"), "--prompt", "8", "--tokens", "4", "--runs", "1", "--batch", "1,2"]
    compared = [*asked, "--context", "0,5", "--vs", "transformers", "--checkpoint", str(samples.stories260k())]
    assert main([*compared, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [each["case"] for each in said["results"][:4]] == [
        {"prompt": 8, "tokens": 4, "batch": batch, "context": context} for context in (0, 5) for batch in (1, 2)
    ]
    assert [each["system"].split()[0] for each in said["results"]] == ["ONNX"] * 4 + ["transformers"] * 4
    assert all(each["tokens_per_second"] > 0 for each in said["results"])
    assert said["copy_bytes_per_second"] > 0 and "memory" not in said
    assert main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[1].startswith("ONNX Runtime")
        and "TTFT ms" in lines[2]
        and [line.split()[0] for line in lines[3:5]] == ["1", "2"]
    )
    assert main([*asked, "--vs", "transformers"]) == 2
    assert "--vs transformers and --checkpoint CHECKPOINT go together" in capsys.readouterr().err
    assert main([*asked, "--vs", "transformers", "--checkpoint", str(tmp_path / "nothing")]) == 2
    said = capsys.readouterr()
    assert "nothing" in said.err and not said.out
    assert main([*asked, "--speculation", "prompt-lookup", "--json"]) == 0
    assert {each["bytes_per_second"] for each in json.loads(capsys.readouterr().out)["results"]} == {None}
    with pytest.raises(SystemExit):
        main([*asked[:-1], "1,x"])
    assert "invalid _numbers value" not in capsys.readouterr().err
