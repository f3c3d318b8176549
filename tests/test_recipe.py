"""Recipes are data: whatever stands in them ends in a Recipe or in one sentence."""

import pytest
from families import save

from llmtrt.errors import UserError
from llmtrt.quantization.pipeline import quantize
from llmtrt.quantization.recipe import Recipe, names, read_recipe


def test_every_recipe_that_comes_with_llmtrt_reads():
    assert names() == ["fp16", "fp32", "gptq-g64", "gptq-mixed", "int4", "int4-g32", "int4-g64", "int4-vocab8"]
    assert {name: read_recipe(name).group_size for name in names() if "-g" in name} == {
        "gptq-g64": 64,
        "int4-g32": 32,
        "int4-g64": 64,
    }


BOMB = "a: &a [x, x]\n" + "".join(
    f"{n}: &{n} [*{p}, *{p}]\n" for p, n in zip("abcdefghijklmnopqrstuvwx", "bcdefghijklmnopqrstuvwxy")
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("group_size: 48", "group_size is 48, expected one of 16, 32"),
        ("group_size: 64.0", "group_size is 64.0"),
        ("calibration_length: 1", "calibration_length should be an integer from 2"),
        ("calibration_sequences: lots", "calibration_sequences should be an integer"),
        ("group_size: true", "group_size is True"),
        ("group_size: 2001-13-45", "is not valid YAML"),
        ("dtype: [float16]", "dtype is a list"),
        ("exclude: lm_head", "exclude should be a list"),
        ("exclude: [1]", "exclude should be a list"),
        ("colour: 3", "unknown key 'colour'"),
        ("[1]: 2", "valid YAML|unknown key"),
        ("- rtn", "should be a mapping"),
        ("", "should be a mapping"),
        ("algorithm: [rtn", "is not valid YAML"),
        ("!!python/object/apply:os.system [false]", "is not valid YAML"),
        (BOMB + "algorithm: *y", "unknown key 'a'"),
        (BOMB.replace("a: &a", "algorithm: &a", 1), "unknown key 'b'"),
    ],
)
def test_bad_recipes_are_told(tmp_path, text, said):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=said) as refusal:
        read_recipe(tmp_path / "recipe.yaml")
    assert len(str(refusal.value)) < 500 and "recipe.yaml" in str(refusal.value)


def test_a_recipe_made_in_python_is_checked_too():
    with pytest.raises(UserError, match="dtype is 'int7'"):
        Recipe(dtype="int7")


def test_a_pattern_that_matches_nothing_is_refused(tmp_path):
    checkpoint = save("qwen3", tmp_path / "checkpoint")
    with pytest.raises(UserError, match=r"excludes '\*\.qproj'"):
        quantize(checkpoint, tmp_path / "package", Recipe(exclude=("*.qproj",)))
    assert not (tmp_path / "package").exists()


def test_patterns_reach_the_vocabulary(tmp_path):
    checkpoint = save("llama-mha-untied", tmp_path / "checkpoint")
    recipe = Recipe(embedding="int8", lm_head="int8", exclude=("model.embed_tokens", "*.q_proj"))
    report = quantize(checkpoint, tmp_path / "package", recipe).report
    forms = {name: tensor["form"] for name, tensor in report["tensors"].items()}
    assert forms["model.embed_tokens.weight"] == "float16" and forms["lm_head.weight"] == "int8"
    assert {forms[f"model.layers.{i}.self_attn.q_proj.weight"] for i in range(3)} == {"float16"}
    assert "*.q_proj" in report["kept"]["model.layers.0.self_attn.q_proj.weight"]
