"""Calibrated quantization end to end, on tiny random models and on real weights."""

import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import samples
import torch
from families import CONFIGS, save

from llmtrt.checkpoints import open_checkpoint
from llmtrt.errors import UserError
from llmtrt.evaluate.agreement import agreement
from llmtrt.models import decoder_of
from llmtrt.package import open_package
from llmtrt.quantization import layerwise as module
from llmtrt.quantization.pipeline import quantize
from llmtrt.quantization.recipe import Recipe
from llmtrt.quantization.solutions import Solutions
from llmtrt.quantization.torch_model import LayerwiseModel
from llmtrt.runtime.llm import LLM

TINY = Recipe("gptq", 16, "float32", calibration_sequences=6, calibration_length=32)
TEXT = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her friends. "


@pytest.fixture(scope="module")
def stories():
    return samples.stories260k()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Nothing that the model was trained on, and enough of it."""
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text(samples.data("tinyshakespeare.txt").read_text()[:20_000])
    return path


def solved(checkpoint, ids, folder, block):
    source = open_checkpoint(checkpoint)
    decoder = decoder_of(source.config, str(checkpoint), 64, ())
    folder.mkdir()
    found = module.calibrate(source, decoder, ids, lambda name, k: block if k % block == 0 else None, "float32", folder)
    return found, LayerwiseModel(source, decoder)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_calibrated_and_better_than_rounding(family, tmp_path):
    """Over the calibration's own tokens, the hidden states after the last layer."""
    from llmtrt.quantization.rtn import round_to_nearest

    checkpoint = save(family, tmp_path / "checkpoint")
    ids = np.random.default_rng(1).integers(3, 90, (8, 24))
    found, model = solved(checkpoint, ids, tmp_path / "work", 8)

    hidden = partial(model.hidden, torch.from_numpy(ids))

    def dense(layer):
        names = [name for stage in layer.stages for name in stage.weights if name in found]
        solutions = {name: found[name] for name in names}
        return {
            name: torch.from_numpy(one.q * np.repeat(one.scale, one.q.shape[1] // one.scale.shape[1], 1))
            for name, one in solutions.items()
        }

    def nearest(layer):
        rounded = {}
        for name in dense(layer):
            weight = model.weight(name).numpy()
            q, scale = round_to_nearest(weight, 8, np.dtype(np.float32))
            rounded[name] = torch.from_numpy(q * np.repeat(scale, 8, 1))
        return rounded

    full = hidden(lambda layer: {})
    ours, theirs = (float((hidden(each) - full).square().mean()) for each in (dense, nearest))
    assert sum(len(dense(layer)) for layer in model.layers) >= 4 * len(model.layers)
    assert ours < 0.7 * theirs


def test_real_weights_lose_less_than_by_rounding(stories, text, tmp_path):
    held_out = samples.data("tinyshakespeare.txt").read_text()[50_000:54_000]
    divergence, full = {}, quantize(stories, tmp_path / "fp32", "fp32").package
    for name, recipe in {
        "rtn": Recipe("rtn", 64, "float32"),
        "gptq": Recipe("gptq", 64, "float32", calibration_sequences=16, calibration_length=128),
    }.items():
        made = quantize(stories, tmp_path / name, recipe, calibration=text if recipe.calibrates else "self")
        with LLM(made.package.path, accuracy_level=1) as llm, LLM(full.path) as reference:
            found = agreement(llm, reference, llm.encode(held_out, special=False), 256)
            divergence[name] = found["kl_divergence"]
    assert 0 < divergence["gptq"] < 0.5 * divergence["rtn"], divergence
    assert made.package.manifest["calibration"]["text"] == "stories.txt"
    errors = [each["output_error"] for each in made.report["tensors"].values() if each["form"] == "int4"]
    assert len(errors) == 5 * 7 - 5 and 0 < max(errors) < 0.5  # down_proj's K of 172 takes no block


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stop_at", [0, 2, 4])
def test_an_interrupted_run_goes_on_and_ends_in_the_same_bytes(stories, text, tmp_path, stop_at):
    recipe = Recipe("gptq", 32, calibration_sequences=8, calibration_length=64)
    whole = quantize(stories, tmp_path / "whole", recipe, calibration=text).package
    output, layers = tmp_path / "again", []

    def interrupt(done, total, note=""):
        if note == "calibrating" and done == stop_at:
            raise Stopped

    def watch(done, total, note=""):
        if note == "calibrating":
            layers.append(done)

    with pytest.raises(Stopped):
        quantize(stories, output, recipe, calibration=text, report=interrupt)
    assert not output.exists() and (tmp_path / "again.calibration").is_dir()
    again = quantize(stories, output, recipe, calibration=text, report=watch).package
    assert layers == list(range(stop_at, 5)) and not (tmp_path / "again.calibration").exists()
    assert again.digest == whole.digest
    for name in whole.manifest["files"]:
        assert (again.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_what_another_run_left_is_not_taken_over(stories, text, tmp_path):
    recipe = Recipe("gptq", 32, calibration_sequences=8, calibration_length=64)

    def interrupt(done, total, note=""):
        if note == "calibrating" and done == 3:
            raise Stopped

    other = text.with_name("other.txt")
    other.write_text(text.read_text()[5000:])
    with pytest.raises(Stopped):
        quantize(stories, tmp_path / "again", recipe, calibration=other, report=interrupt)
    assert list((tmp_path / "again.calibration").glob("layer-*.npz"))
    recipe = replace(recipe, exclude=("*.o_proj",))
    partly = quantize(stories, tmp_path / "again", recipe, calibration=text)
    assert partly.package.digest == quantize(stories, tmp_path / "partly", recipe, calibration=text).package.digest


def test_a_model_can_write_its_own_calibration(stories, tmp_path):
    recipe = Recipe("gptq", 32, calibration_sequences=4, calibration_length=48)
    one, two = (quantize(stories, tmp_path / name, recipe).package for name in ("one", "two"))
    assert one.digest == two.digest
    assert one.manifest["calibration"] == {"text": "self", "sequences": 4, "length": 48}
    assert not list(tmp_path.glob("*.calibration"))


def test_chats_are_rendered_as_the_model_has_them(stories, tmp_path):
    from llmtrt.quantization.calibration_text import read_sequences
    from llmtrt.runtime.tokenizer import Tokenizer

    folder = tmp_path / "tokenizer"
    shutil.copytree(stories, folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}")
    path = tmp_path / "chats.jsonl"
    chat = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "Yes."}]
    path.write_text(json.dumps({"messages": chat}) + "\n\n" + json.dumps({"text": TEXT}) + "\n")
    tokenizer = Tokenizer(folder)
    ids = read_sequences(path, tokenizer, 2, 30).reshape(-1).tolist()
    both = tokenizer.encode(f"[user] {TEXT}\n[assistant] Yes.\n", special=False) + tokenizer.encode(TEXT, special=False)
    assert ids == both[:60]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("chat.jsonl", '{"prompt": 1}', "line 1: expected a JSON object with messages"),
        ("chat.jsonl", "[" * 100_000, "line 1: expected a JSON object"),
        ("short.txt", "a few words", r"tokens and the recipe asks for 6 × 32: give a longer text"),
        ("binary.txt", b"\xff\xfe\x00", "cannot be read as UTF-8 text"),
        ("missing.txt", None, "neither self nor a file"),
    ],
)
def test_a_bad_calibration_text_is_told(stories, tmp_path, name, content, said):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=said):
        quantize(stories, tmp_path / "package", TINY, calibration=path)
    assert [*tmp_path.iterdir()] == ([] if content is None else [path])


def test_without_torch_a_sentence_says_so(stories, text, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(UserError, match="algorithm gptq needs torch.*pip install torch"):
        quantize(stories, tmp_path / "package", TINY, calibration=text)


def test_a_recipe_that_does_not_calibrate_leaves_a_calibration_alone(stories, tmp_path):
    """What an interrupted run keeps there may be hours of work."""
    kept = tmp_path / "package.calibration" / "layer-00000.npz"
    kept.parent.mkdir()
    kept.write_bytes(b"hours")
    quantize(stories, tmp_path / "package", "int4-g32")
    assert kept.read_bytes() == b"hours"


def test_a_recipe_that_does_not_calibrate_refuses_a_text(stories, text, tmp_path):
    with pytest.raises(UserError, match="algorithm rtn takes no --calibration"):
        quantize(stories, tmp_path / "package", "int4", calibration=text)


def test_inputs_that_are_all_zeros_do_not_matter(tmp_path):
    """A model whose MLPs see nothing: its norms before them are zero."""
    from safetensors.numpy import load_file, save_file

    checkpoint = save("llama-gqa-tied", tmp_path / "checkpoint")
    weights = load_file(checkpoint / "model.safetensors")
    for name in weights:
        if "post_attention_layernorm" in name:
            weights[name] = weights[name] * 0
    save_file(weights, checkpoint / "model.safetensors")
    found, _ = solved(checkpoint, np.random.default_rng(1).integers(3, 90, (4, 24)), tmp_path / "work", 16)
    one = found["model.layers.1.mlp.gate_proj.weight"]
    assert one.error == 0 and np.isfinite(one.scale).all() and (one.scale > 0).all()


def test_excluded_matrices_stay_and_the_rest_makes_up_for_nothing_there(stories, text, tmp_path):
    recipe = Recipe("gptq", 32, "float32", exclude=("*.v_proj",), calibration_sequences=4, calibration_length=64)
    made = quantize(stories, tmp_path / "package", recipe, calibration=text)
    forms = {name: each["form"] for name, each in made.report["tensors"].items()}
    assert {form for name, form in forms.items() if "v_proj" in name} == {"float32"}
    assert {form for name, form in forms.items() if "q_proj" in name} == {"int4"}


def test_solutions_are_read_back_as_they_were(tmp_path):
    one = module.Solution(np.arange(-8, 8, dtype=np.int8).reshape(2, 8), np.float32([[0.5], [0.25]]), 0.125)
    solutions = Solutions(tmp_path)
    solutions.save(0, {"model.layers.0.a/b.weight": one})
    found = Solutions(tmp_path)["model.layers.0.a/b.weight"]
    assert np.array_equal(found.q, one.q) and np.array_equal(found.scale, one.scale) and found.error == 0.125


def test_the_package_of_a_calibrated_model_opens(stories, text, tmp_path):
    made = quantize(stories, tmp_path / "package", TINY, calibration=text)
    assert open_package(made.package.path).manifest["recipe"]["calibration_sequences"] == 6
