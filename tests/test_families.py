"""Every family, tiny and random: the fp32 package on ONNX Runtime against transformers in fp32."""

import functools
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from families import CONFIGS, SIZES, reference, save

from llmtrt import LLM, SamplingParams, quantize
from llmtrt.graph.lint import lint
from llmtrt.quantization.recipe import Recipe

PROMPTS = [np.random.default_rng(n).integers(3, SIZES["vocab_size"], n).tolist() for n in (5, 23, 1, 14)]
FOLDER = tempfile.TemporaryDirectory(prefix="llmtrt-families-")  # what is made once stays until the tests end
GREEDY = SamplingParams(max_tokens=32, temperature=0, ignore_eos=True)


@functools.cache
def package(name: str, recipe: str | Recipe = "fp32", max_seq: int | None = None) -> Path:
    folder = Path(tempfile.mkdtemp(dir=FOLDER.name))
    quantize(save(name, folder / "checkpoint"), folder / "package", recipe, max_seq)
    return folder / "package"


@functools.cache
def expected(name: str, prompt: int) -> list[int]:
    """32 greedy tokens of transformers, without a cache: no code of its is shared between the steps."""
    model, ids = reference(name), list(PROMPTS[prompt])
    with torch.no_grad():
        for _ in range(32):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(PROMPTS[prompt]) :]


@pytest.mark.parametrize("name", CONFIGS)
def test_graph_passes_the_checker_and_the_linter(name):
    graph = package(name) / "model.onnx"
    onnx.checker.check_model(str(graph), full_check=True)
    assert [finding for finding in lint(graph) if finding.severity == "error"] == []


# Long RoPE by its declared capacity: transformers switches to the long factors by the length it sees.
@pytest.mark.parametrize(
    ("name", "length", "max_seq"),
    [(name, 60, None) for name in CONFIGS if name != "phi3-long"] + [("phi3-long", 60, 64), ("phi3-long", 90, None)],
)
def test_logits_equal_transformers(name, length, max_seq):
    ids = np.random.default_rng(7).integers(0, SIZES["vocab_size"], length)
    with torch.no_grad():
        wanted = reference(name)(torch.tensor(ids[None])).logits[0].numpy()
    for chunk in (None, 7):
        with LLM(package(name, max_seq=max_seq), accuracy_level=1, **({"chunk": chunk} if chunk else {})) as llm:
            logits = llm.logits(ids.tolist())
        assert logits.shape == wanted.shape and logits.dtype == np.float32
        assert np.abs(logits - wanted).max() <= 1e-4 * (wanted.max() - wanted.min())


@pytest.mark.parametrize("name", CONFIGS)
def test_32_greedy_tokens_equal_transformers_alone_batched_and_chunked(name):
    max_seq = 64 if name == "phi3-long" else None
    wanted = [expected(name, index) for index in range(len(PROMPTS))]
    assert len({*wanted[0], *wanted[1]}) > 4  # a model that repeats one token would pass too easily
    with LLM(package(name, max_seq=max_seq), accuracy_level=1) as llm:
        assert [llm.generate(prompt, GREEDY).token_ids for prompt in PROMPTS] == wanted
        assert [completion.token_ids for completion in llm.generate(PROMPTS, GREEDY)] == wanted
    with LLM(package(name, max_seq=max_seq), accuracy_level=1, chunk=4, max_batch=3) as llm:
        assert [completion.token_ids for completion in llm.generate(PROMPTS, GREEDY)] == wanted


RECIPES = {
    "g32": Recipe(group_size=32),
    "int8 vocabulary": Recipe(embedding="int8", lm_head="int8"),
    "int4 vocabulary": Recipe(group_size=16, embedding="int4", lm_head="int4"),
    "int8 head": Recipe(lm_head="int8"),
    "fp32 scales, part excluded": Recipe(dtype="float32", group_size=64, exclude=("*.o_proj", "*.0.mlp.*")),
}


@pytest.mark.parametrize("name", ["llama-gqa-tied", "llama-mha-untied", "phi3-partial", "gemma3"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_int4_packages_equal_transformers_with_the_same_rounded_weights(name, recipe):
    """The graph's integers, unpacked by onnx's reference and put into transformers, give the graph's logits."""
    folder = package(name, recipe)
    from rounded import rounded_model

    model = rounded_model(name, folder)
    ids = np.random.default_rng(8).integers(0, SIZES["vocab_size"], 40)
    with torch.no_grad():
        wanted = model(torch.tensor(ids[None])).logits[0].numpy()
        unrounded = reference(name)(torch.tensor(ids[None])).logits[0].numpy()
    with LLM(folder, accuracy_level=1) as llm:
        logits = llm.logits(ids.tolist())
    span = wanted.max() - wanted.min()
    assert np.abs(logits - wanted).max() <= 5e-3 * span  # activations are fp16
    assert np.abs(unrounded - wanted).max() >= 2e-2 * span  # and INT4 is not


def test_gemma3_survives_a_residual_beyond_fp16(tmp_path):
    """Its residual passes 65,504 as gemma-3-270m's does (103,792); in fp16 that is infinity, and NaN after the norm."""
    import copy

    model = copy.deepcopy(reference("gemma3"))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_feedforward_layernorm.weight.add_(20000.0)
    seen = []
    model.model.norm.register_forward_hook(lambda module, inputs, output: seen.append(float(inputs[0].abs().max())))
    model.save_pretrained(tmp_path / "checkpoint")
    quantize(tmp_path / "checkpoint", tmp_path / "package", "fp16")
    ids = np.random.default_rng(9).integers(0, SIZES["vocab_size"], 40)
    with torch.no_grad():
        wanted = model(torch.tensor(ids[None])).logits[0].numpy()
        half = copy.deepcopy(model).half()(torch.tensor(ids[None])).logits[0].float().numpy()
    assert seen[0] > 65504 and np.isnan(half).any()
    with LLM(tmp_path / "package", accuracy_level=1) as llm:
        logits = llm.logits(ids.tolist())
    assert np.abs(logits - wanted).max() <= 5e-3 * (wanted.max() - wanted.min())
    assert (logits.argmax(-1) == wanted.argmax(-1)).mean() >= 0.97
