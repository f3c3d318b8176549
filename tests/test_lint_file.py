"""Files: what is no ONNX model, external data, onnx.checker, and the rules' own bookkeeping."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from onnx_models import FP32, INT64, model, node, run, session

from llmtrt.errors import UserError
from llmtrt.graph.lint import RULES, lint, lint_model


def found(path, **options):
    return {finding.rule for finding in lint(path, **options)}


def adder(**constants):
    return model([node("Add", ["x", "w"], ["y"])], [("x", FP32, [2048])], [("y", FP32, [2048])], constants)


def with_data(folder, location="weights.bin", offset=0, write=True, size=2048):
    """x + w with w in external data; returns the model's path."""
    if write:
        (folder / "weights.bin").write_bytes(np.arange(size, dtype=np.float32).tobytes())
    weight = TensorProto(name="w", data_type=FP32, dims=[2048], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": str(offset), "length": "8192"}.items():
        weight.external_data.add(key=key, value=value)
    (folder / "model.onnx").write_bytes(adder(w=weight).SerializeToString())
    return folder / "model.onnx"


def test_external_data_in_its_place_is_clean(tmp_path):
    import onnxruntime

    path = with_data(tmp_path)
    y = onnxruntime.InferenceSession(str(path)).run(None, {"x": np.zeros(2048, np.float32)})[0]
    np.testing.assert_array_equal(y, np.arange(2048))
    assert found(path) == set()
    assert found(tmp_path) == set()  # a package's folder


@pytest.mark.parametrize("location", ["../weights.bin", "a/../../weights.bin", "{outside}"])
def test_external_data_outside(tmp_path, location):
    inside = tmp_path / "inside"
    inside.mkdir()
    outside = tmp_path / "weights.bin"
    outside.write_bytes(bytes(8192))
    path = with_data(inside, location.format(outside=outside), write=False)
    with pytest.raises(onnx.checker.ValidationError):
        onnx.load(path)
    assert found(path) == {"external-data-path"}


def test_external_data_behind_a_link(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret").write_bytes(bytes(8192))
    (inside / "weights.bin").symlink_to(tmp_path / "secret")
    path = with_data(inside, write=False)
    with pytest.raises(onnx.checker.ValidationError):
        onnx.load(path)
    assert found(path) == {"external-data-path"}


def test_external_data_missing_or_short(tmp_path):
    path = with_data(tmp_path, write=False)
    with pytest.raises(onnx.checker.ValidationError):
        onnx.load(path)
    (finding,) = lint(path)
    assert (finding.rule, finding.severity) == ("external-data-missing", "warning")
    for options in ({"size": 2047}, {"offset": 4}):
        path = with_data(tmp_path, **options)
        with pytest.raises(Exception, match="."):
            onnx.load(path)
        assert found(path) == {"external-data-size"}


def test_external_zero_points_are_looked_at(tmp_path):
    """Not symmetric, which is known only from the data file, and is silence without it."""
    constants = {
        "w": np.ones((64, 2048), np.int8),
        "s": np.ones((2, 2048), np.float32),
        "z": np.full((2, 2048), 3, np.int8),
    }
    proto = model(
        [node("DequantizeLinear", ["w", "s", "z"], ["d"], axis=0, block_size=32), node("MatMul", ["x", "d"], ["y"])],
        [("x", FP32, [1, 64])],
        [("y", FP32, [1, 2048])],
        constants,
    )
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    assert found(tmp_path / "m.onnx") == {"quant-zero-point"}
    (tmp_path / "m.data").unlink()
    assert found(tmp_path / "m.onnx") == {"external-data-missing"}


def write(folder: Path, data: bytes) -> Path:
    (folder / "bad.onnx").write_bytes(data)
    return folder / "bad.onnx"


@pytest.mark.parametrize("data", [b"", b"GGUF\x03\x00\x00\x00" + bytes(64), b"hello, world\n" * 50, bytes(4096), b"{}"])
def test_what_is_no_onnx_model(tmp_path, data):
    path = write(tmp_path, data)
    with pytest.raises(UserError, match=re.escape(str(path))):
        lint(path)


@pytest.mark.filterwarnings("ignore:Ignoring unknown external data key")
def test_truncated_and_damaged_models_never_crash(tmp_path):
    """A byte changed or the end cut off, in models that many rules look at."""
    rotary = [node("Slice", ["w", "from", "to"], ["c"]), node("Constant", [], ["from"], value_ints=[0])]
    rich = model(
        [
            rotary[1],
            node("Constant", [], ["to"], value_ints=[8]),
            rotary[0],
            node("Abs", ["past"], ["moved"]),
            node("TensorScatter", ["moved", "new", "at"], ["present"], mode="circular", axis=2),
            node("DequantizeLinear", ["q", "s", "z"], ["d"], axis=0, block_size=16),
            node("MatMul", ["x", "d"], ["y"]),
            node("Attention", ["new", "present", "present", "", "", "", "at"], ["attended"], is_causal=1, softcap=3.0),
            node("TopK", ["y", "k"], ["best", "where"]),
            node("OneHot", ["where", "k", "pair"], ["hot"]),
        ],
        [("past", FP32, [1, 2, "C", 8]), ("new", FP32, [1, 2, 1, 8]), ("at", INT64, [1]), ("x", FP32, [1, 32])],
        [("present", FP32, [1, 2, "C", 8]), ("attended", FP32, [1, 2, 1, 8])],
        {
            "w": np.arange(16.0),
            "q": np.ones((32, 8), np.int8),
            "s": np.ones((2, 8), np.float32),
            "k": np.array([4000]),
            "z": np.ones((2, 8), np.int8),
            "pair": np.array([0, 1], np.float32),
        },
    )
    draw = np.random.default_rng(0)
    for whole in (with_data(tmp_path).read_bytes(), rich.SerializeToString()):
        for trial in range(400):
            data = bytearray(whole)
            if trial % 4 == 0:
                data = data[: draw.integers(len(data))]
            else:
                data[draw.integers(len(data))] = draw.integers(256)
            try:
                lint(write(tmp_path, bytes(data)))
            except UserError as error:
                assert "bad.onnx" in str(error)


def gaps(case):
    """float a [2] → b [2], with something that nobody writes, and the names in what the linter says of it."""

    def branch(name, read):
        return helper.make_graph(
            [node("Abs", [read], [name], name=f"in {name}")],
            name,
            [],
            [helper.make_tensor_value_info(name, FP32, [2])],
        )

    local = helper.make_function(
        "local", "F", ["x"], ["y"], [node("Abs", ["nowhere"], ["y"], name="inside")], [helper.make_opsetid("", 24)]
    )
    nodes, functions, said = {
        "input": ([node("Abs", ["nowhere"], ["b"], name="n")], (), ("n", "'nowhere'")),
        "order": ([node("Abs", ["c"], ["b"], name="n"), node("Abs", ["a"], ["c"])], (), ("n", "'c'")),
        "cycle": ([node("Add", ["a", "c"], ["b"], name="n"), node("Abs", ["b"], ["c"])], (), ("n", "'c'")),
        "output": ([node("Abs", ["a"], ["c"])], (), ("", "'b'")),
        "sibling": (
            [node("Equal", ["a", "a"], ["all"]), node("ReduceMin", ["all"], ["if"], keepdims=0)]
            + [node("If", ["if"], ["b"], then_branch=branch("t", "a"), else_branch=branch("e", "t"))],
            (),
            ("in e", "'t'"),
        ),
        "function": ([node("F", ["a"], ["b"], domain="local")], [local], ("inside", "'nowhere'")),
    }[case]
    proto = model(
        nodes, [("a", FP32, [2])], [("b", FP32, [2])], functions=functions, domains=("local",) if functions else ()
    )
    return proto, said


@pytest.mark.parametrize("case", ["input", "order", "cycle", "output", "sibling", "function"])
@pytest.mark.parametrize("read", [lambda proto: proto, ir.from_proto])
def test_what_nobody_writes_is_named(case, read):
    proto, (where, said) = gaps(case)
    with pytest.raises(Exception, match="."):
        onnx.checker.check_model(proto, full_check=True)
    (finding,) = lint_model(read(proto))
    assert (finding.rule, finding.node) == ("onnx-checker", where)
    assert said in finding.message and len(finding.message) < 200


def test_a_broken_model_prints_nothing(tmp_path):
    """In a process of its own: pytest's handlers hide what libraries log to stderr."""
    path = write(tmp_path, gaps("input")[0].SerializeToString())
    code = "import sys; from llmtrt.graph.lint import lint; print([f.rule for f in lint(sys.argv[1])])"
    ran = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("['onnx-checker']\n", "")


def test_external_data_of_an_attribute_in_a_local_function(tmp_path):
    """Beside the model, outside of its folder, and nowhere."""

    def saved(location):
        shape = TensorProto(name="s", data_type=INT64, dims=[2], data_location=TensorProto.EXTERNAL)
        shape.external_data.add(key="location", value=location)
        nodes = [node("Constant", [], ["s"], value=shape), node("Reshape", ["x", "s"], ["y"])]
        local = helper.make_function("local", "F", ["x"], ["y"], nodes, [helper.make_opsetid("", 24)])
        proto = model(
            [node("F", ["a"], ["b"], domain="local")],
            [("a", FP32, [6])],
            [("b", FP32, [2, 3])],
            functions=[local],
            domains=("local",),
        )
        return write(tmp_path, proto.SerializeToString())

    (tmp_path / "shape.bin").write_bytes(np.array([2, 3]).tobytes())
    told = {"external-data-path", "external-data-missing"}
    assert found(saved("shape.bin")) & told == set()
    assert found(saved("../shape.bin")) & told == {"external-data-path"}
    (tmp_path / "shape.bin").unlink()
    assert found(saved("shape.bin")) & told == {"external-data-missing"}


def test_paths_that_hold_no_model(tmp_path):
    for path in (tmp_path / "absent.onnx", tmp_path):
        with pytest.raises(UserError, match="cannot read"):
            lint(path)


def test_a_file_beyond_protobufs_limit_is_not_read(tmp_path):
    with (tmp_path / "huge.onnx").open("wb") as file:
        file.truncate(1 << 31)
    with pytest.raises(UserError, match="external data"):
        lint(tmp_path / "huge.onnx")


def test_what_onnx_checker_says():
    trap = model([node("MatMul", ["x", "x"], ["y"])], [("x", FP32, [2, 3])], [("y", FP32, [2, 3])])
    with pytest.raises(onnx.shape_inference.InferenceError):
        onnx.checker.check_model(trap, full_check=True)
    with pytest.raises(Exception, match="."):
        session(trap)
    (finding,) = lint_model(trap)
    assert finding.rule == "onnx-checker" and "MatMul" in finding.message


def test_older_opsets_are_another_operators_meaning():
    """Softmax changed in opset 13: the same node, other numbers. Foreign models get a warning, decoders an error."""

    def softmax(opset):
        return model([node("Softmax", ["x"], ["y"])], [("x", FP32, [2, 2, 2])], [("y", FP32, [2, 2, 2])], opset=opset)

    x = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
    assert abs(run(softmax(12), x=x) - run(softmax(24), x=x)).max() > 0.1
    (finding,) = lint_model(softmax(12))
    assert (finding.rule, finding.severity) == ("opset-version", "warning")
    assert lint_model(softmax(24)) == []


def test_shapes_are_inferred_through_small_external_constants(tmp_path):
    """Reshape's target lies in the data file: without its values the causal trap could not be told from a right use."""
    proto = model(
        [
            node("Reshape", ["flat", "shape"], ["k"]),
            node("Attention", ["q", "k", "k"], ["y"], is_causal=1, name="attend"),
        ],
        [("q", TensorProto.FLOAT16, [1, 8, 8, 64]), ("flat", TensorProto.FLOAT16, [2048])],
        [("y", TensorProto.FLOAT16, [1, 8, 8, 64])],
        {"shape": np.array([1, 4, 8, 64])},
    )
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    assert found(tmp_path / "m.onnx") == set()
    (tmp_path / "m.data").unlink()
    assert found(tmp_path / "m.onnx") == {"external-data-missing", "attention-causal-alignment"}


def test_every_rule_says_why_and_is_tested():
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_lint_*.py"))
    for name, rule in RULES.items():
        assert name == rule.id and re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", name)
        assert rule.reason and rule.otherwise and rule.advice
        for text in (rule.reason, rule.otherwise, rule.advice):  # parts of one line: "message; advice"
            assert text == text.strip() and text[-1] not in ".;:,", text
        assert f'"{name}"' in tests, f"no test names {name}"


def test_lint_imports_no_torch_and_no_tensorrt():
    code = (
        "import sys, llmtrt.graph.lint; print([m for m in ('torch', 'onnxruntime') if m in sys.modules], "
        "[m for m in sys.modules if 'tensorrt' in m])"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    ).stdout
    assert said.strip() == "[] []"
