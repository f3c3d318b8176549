"""Bits spent where they count: the choice against enumeration, sensitivities against the divergence that really follows."""

import itertools

import numpy as np
import pytest
import samples
import torch

from llmtrt.checkpoints import open_checkpoint
from llmtrt.errors import UserError
from llmtrt.models import decoder_of
from llmtrt.quantization.pipeline import quantize
from llmtrt.quantization.precision import INT8, Form, candidates, choose_forms
from llmtrt.quantization.recipe import Recipe
from llmtrt.quantization.scales import expanded, search_scales
from llmtrt.quantization.scales import quantize as nearest
from llmtrt.quantization.sensitivity import sensitivities
from llmtrt.quantization.torch_model import LayerwiseModel


@pytest.mark.parametrize("bits", [4.2, 4.5, 5.5, 7.0])
def test_the_choice_is_about_the_best_that_fits(bits):
    rng = np.random.default_rng(2)
    shapes = {f"m{i}": (int(rng.integers(1, 9)) * 64, 256) for i in range(5)}
    losses = {}
    for name, (n, _) in shapes.items():
        worst = float(rng.lognormal(0, 2) * n)
        losses[name] = {
            Form(128): worst,
            Form(64): worst * 0.8,
            Form(32): worst * 0.65,
            Form(16): worst * 0.5,
            INT8: worst / 300,
        }
    chosen = choose_forms(losses, shapes, bits)

    def total(pick):
        return sum(losses[name][form] for name, form in pick.items())

    def size(pick):
        return sum(form.bits(256) * shapes[name][0] for name, form in pick.items()) / sum(n for n, _ in shapes.values())

    every = (dict(zip(losses, pick)) for pick in itertools.product(*losses.values()))
    best = min((total(pick) for pick in every if size(pick) <= bits), default=None)
    assert size(chosen) <= bits and total(chosen) <= 1.35 * best
    uniform = min(total(dict.fromkeys(losses, form)) for form in losses["m0"] if form.bits(256) <= bits)
    assert total(chosen) < uniform


def test_what_no_block_divides_is_no_candidate():
    assert candidates(172) == [] and candidates(576) == [Form(64), Form(32), Form(16), INT8]
    assert [form.bits(576) for form in candidates(576)] == [4.25, 4.5, 5.0, 8 + 16 / 576]


@pytest.fixture(scope="module")
def stories():
    source = open_checkpoint(samples.stories260k())
    return LayerwiseModel(source, decoder_of(source.config, str(source.path), None, ()))


def logits(model, ids, others) -> torch.Tensor:
    return model.finish(model.hidden(ids, lambda layer: others), ids).flatten(0, 1).double().log_softmax(1)


def test_sensitivities_foretell_the_divergence(stories):
    """Each matrix rounded by itself; to second order, so within a factor, and in about the same order."""
    model = stories
    text = samples.data("tinyshakespeare.txt")
    from llmtrt.runtime.tokenizer import Tokenizer

    ids = Tokenizer(samples.stories260k()).encode(text.read_text()[:6000], special=False)[: 6 * 128]
    ids = torch.tensor(ids).reshape(6, 128)
    form = Form(32)
    options = {
        name: [form, INT8]
        for layer in model.layers
        for stage in layer.stages
        for name in stage.weights
        if "down" not in name
    }
    found = sensitivities(model, ids, options, torch.float32)
    assert found.keys() == options.keys()
    with torch.no_grad():
        full = logits(model, ids, {})
        expected, real = [], []
        for layer in model.layers[::2]:
            for name in [name for stage in layer.stages for name in stage.weights if name in options]:
                model.enter(layer)
                weight = model.weight(name)
                scale = search_scales(weight, torch.ones(weight.shape[1]), 32, torch.float32)
                rounded = nearest(weight, expanded(scale, 32)) * expanded(scale, 32)
                other = logits(model, ids, {name: rounded})
                real.append(float((full.exp() * (full - other)).sum(1).mean()))
                expected.append(found[name][form])
                assert 0 < found[name][INT8] < found[name][form] / 50
    ratios = np.array(expected) / np.array(real)
    assert 0.5 < np.median(ratios) < 2 and (ratios > 0.2).all() and (ratios < 6).all(), ratios
    ranks = [np.argsort(np.argsort(each)) for each in (expected, real)]
    assert np.corrcoef(*ranks)[0, 1] > 0.7


def test_a_mixed_package_spends_its_bits_and_runs(tmp_path):
    from llmtrt.runtime.llm import LLM

    text = tmp_path / "text.txt"
    text.write_text(samples.data("tinyshakespeare.txt").read_text()[:20_000])
    recipe = Recipe("gptq", bits=4.8, calibration_sequences=8, calibration_length=64)
    made = quantize(samples.stories260k(), tmp_path / "package", recipe, calibration=text)
    taken = {name: one for name, one in made.report["tensors"].items() if one["form"] in ("int4", "int8")}
    forms = {(one["form"], one.get("block")) for one in taken.values()}
    assert len(forms) > 1 and {form for form, _ in forms} <= {"int4", "int8"}
    bits = {"int8": lambda one: 8 + 16 / one["shape"][0], "int4": lambda one: 4 + 16 / one.get("block", 1)}
    sizes = {name: one["shape"][0] * one["shape"][1] for name, one in taken.items()}
    average = sum(bits[one["form"]](one) * sizes[name] for name, one in taken.items()) / sum(sizes.values())
    assert 4.5 < average <= 4.8
    with LLM(made.package.path) as llm:
        assert len(llm.generate("Once upon a time").token_ids) > 1


@pytest.mark.parametrize("fields", [{"bits": 4.5, "algorithm": "rtn"}, {"bits": 3}, {"bits": "4.5"}, {"bits": True}])
def test_bits_that_cannot_be_are_refused(fields):
    with pytest.raises(UserError, match="bits should be a number from 4.125 to 8.5, and is for the algorithm gptq"):
        Recipe(**({"algorithm": "gptq"} | fields))
