"""Attention: each trap shown on TensorRT-RTX or ONNX Runtime, then named by the linter, then gone."""

import numpy as np
import pytest
import trt_probe
from onnx import TensorProto, helper
from onnx_models import BF16, BOOL, FP16, FP32, INT32, INT64, model, node, rules, run

SLOTS = {"m": 3, "pk": 4, "pv": 5, "n": 6}


def attention(
    queries=4,
    keys=4,
    kind=FP16,
    heads=4,
    kv_heads=2,
    dim=64,
    value_dim=None,
    extra=(),
    outputs=("y",),
    batch=2,
    more_outputs=(),
    **attributes,
):
    """Attention(q, k, v) plus ``extra`` inputs (name, type, shape) in their slots; grouped heads by default."""
    value_dim = value_dim or dim
    names = ["q", "k", "v", "", "", "", ""]
    for name, *_ in extra:
        names[SLOTS[name]] = name
    while not names[-1]:
        names.pop()
    inputs = [
        ("q", kind, [batch, heads, queries, dim]),
        ("k", kind, [batch, kv_heads, keys, dim]),
        ("v", kind, [batch, kv_heads, keys, value_dim]),
        *extra,
    ]
    nodes = [node("Attention", names, list(outputs), name="attend", **attributes)]
    return model(nodes, inputs, [("y", kind, [batch, heads, queries, value_dim]), *more_outputs])


def samples(queries, keys, dim=8, heads=1, seed=0):
    draw = np.random.default_rng(seed).standard_normal
    return [draw((1, heads, rows, dim)).astype(np.float32) for rows in (queries, keys, keys)]


def reference(q, k, v, mask):
    """softmax(q kᵀ / √D) v in float64; ``mask`` broadcasts to the scores, True where a key is seen."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scores = np.where(mask, q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def masked(queries, keys, kind=FP16, **rest):
    return attention(queries, keys, kind, extra=[("m", BOOL, [rest.get("batch", 2), 1, queries, keys])], **rest)


def test_plain_attention_is_clean_and_builds():
    assert rules(attention()) == set()
    assert trt_probe.build(attention())[0]


def test_is_causal_sees_position_0_alone_in_a_decode_step():
    q, k, v = samples(1, 8)
    step = attention(1, 8, FP32, 1, 1, 8, batch=1, is_causal=1)
    wrong = run(step, q=q, k=k, v=v)
    np.testing.assert_array_equal(wrong[0, 0, 0], v[0, 0, 0])
    right = reference(q, k, v, np.ones((1, 8), bool))
    assert abs(wrong - right).max() > 0.1
    trap = attention(1, 8, is_causal=1)
    assert trt_probe.attention_handle(trt_probe.parse(trap)).causal_kind.name == "UPPER_LEFT"

    assert "attention-causal-alignment" in rules(trap)
    assert "attention-causal-alignment" in rules(attention("S", "L", is_causal=1))
    positions = np.array([[7]])
    visible = (np.arange(8) <= positions[..., None])[:, None]
    fixed = masked(1, 8, FP32, heads=1, kv_heads=1, dim=8, batch=1)
    np.testing.assert_allclose(run(fixed, q=q, k=k, v=v, m=visible), right, atol=1e-6)
    assert rules(masked(1, 8)) == set()
    assert trt_probe.build(masked(1, 8))[0]


def test_is_causal_over_as_many_keys_as_queries_is_right_and_clean():
    q, k, v = samples(5, 5)
    y = run(attention(5, 5, FP32, 1, 1, 8, batch=1, is_causal=1), q=q, k=k, v=v)
    np.testing.assert_allclose(y, reference(q, k, v, np.tri(5, dtype=bool)), atol=1e-6)
    assert rules(attention(5, 5, is_causal=1)) == set()
    assert rules(attention("S", "S", is_causal=1)) == set()


def test_is_causal_over_unknown_lengths_is_a_warning():
    from llmtrt.graph.lint import lint_model

    (finding,) = lint_model(attention(None, None, is_causal=1))
    assert (finding.rule, finding.severity) == ("attention-causal-alignment", "warning")


def test_causal_beside_a_mask():
    trap = attention(4, 4, extra=[("m", BOOL, [2, 1, 4, 4])], is_causal=1)
    assert "cannot be used together" in trt_probe.parse(trap).errors
    assert rules(trap) == {"attention-causal-and-mask"}
    assert rules(masked(4, 4)) == set()
    assert not trt_probe.parse(masked(4, 4)).errors


def test_nonpad_kv_seqlen_is_connected_to_nothing():
    q, k, v = samples(1, 8)
    padded = attention(1, 8, FP32, 1, 1, 8, batch=1, extra=[("n", INT64, [1])])
    y = run(padded, q=q, k=k, v=v, n=np.array([3]))
    seen = np.arange(8)[None] < 3
    np.testing.assert_allclose(y, reference(q, k, v, seen), atol=1e-6)
    assert abs(y - reference(q, k, v, True)).max() > 0.1  # what TensorRT, without it, computes

    trap = attention(1, 8, extra=[("n", INT64, [2])])
    parsed = trt_probe.parse(trap)
    assert not parsed.errors and parsed.readers("n") == []
    assert rules(trap) == {"attention-nonpad-ignored"}
    fixed = masked(1, 8)
    assert trt_probe.parse(fixed).readers("m") != []
    assert rules(fixed) == set()


CACHE = [("pk", FP16, [2, 2, 8, 64]), ("pv", FP16, [2, 2, 8, 64])]
PRESENT = [("prk", FP16, [2, 2, 12, 64]), ("prv", FP16, [2, 2, 12, 64])]


@pytest.mark.parametrize(
    ("trap", "rule"),
    [
        (attention(extra=CACHE, outputs=("y", "prk", "prv"), more_outputs=PRESENT), "attention-past"),
        (attention(outputs=("y", "", "", "s"), more_outputs=[("s", FP16, [2, 4, 4, 4])]), "attention-past"),
        (attention(softcap=30.0), "attention-softcap"),
        (attention(softmax_precision=1), "attention-softmax-precision"),
        (attention(softmax_precision=10), "attention-softmax-precision"),
        (attention(value_dim=32), "attention-value-dim"),
    ],
)
def test_rejected_by_the_parser(trap, rule):
    assert "'attend'" in trt_probe.parse(trap).errors
    assert rules(trap) == {rule}


def test_softcap_of_zero_is_clean():
    assert not trt_probe.parse(attention(softcap=0.0)).errors
    assert rules(attention(softcap=0.0)) == set()


def test_fp32_mask_over_fp16_queries():
    trap = attention(extra=[("m", FP32, [2, 1, 4, 4])])
    plan, reason = trt_probe.build(trap)
    assert plan is None and "element type" in reason
    assert rules(trap) == {"attention-mask-type"}
    fixed = attention(extra=[("m", FP16, [2, 1, 4, 4])])
    assert rules(fixed) == set()
    assert trt_probe.build(fixed)[0]


@pytest.mark.parametrize(
    ("kind", "dim"), [(FP32, 64), (FP16, 8), (FP16, 20), (FP16, 264), (FP16, 512), (BF16, 8), (BF16, 512)]
)
def test_no_dedicated_kernel(kind, dim):
    trap = masked(4, 8, kind, dim=dim)
    plan, reason = trt_probe.build(trap)
    assert plan is None and ("dedicated kernel" in reason or "input_layouts" in reason)  # the latter: not 8, 16, 24 …
    assert rules(trap) >= {"attention-no-dedicated-kernel"}


@pytest.mark.parametrize("dim", [16, 24, 72, 256])
def test_dedicated_kernel(dim):
    assert trt_probe.build(masked(4, 8, dim=dim))[0]
    assert rules(masked(4, 8, dim=dim)) == set()


def decode_profile(heads, rows):
    return {"q": tuple((1, heads, s, 64) for s in rows), "m": tuple((1, 1, s, 64) for s in rows)}


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 1), (2, 2), (3, 1), (3, 3)])
def test_fewer_than_four_query_heads(heads, kv_heads):
    trap = masked("S", 64, heads=heads, kv_heads=kv_heads, batch=1)
    plan, reason = trt_probe.build(trap, decode_profile(heads, (1, 1, 1)))
    assert plan is None and "dedicated kernel" in reason
    assert rules(trap) == {"attention-no-dedicated-kernel"}


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (4, 4), (5, 5), (8, 2)])
def test_four_query_heads(heads, kv_heads):
    fixed = masked("S", 64, heads=heads, kv_heads=kv_heads, batch=1)
    assert trt_probe.build(fixed, decode_profile(heads, (1, 1, 1)))[0]
    assert rules(fixed) == set()


@pytest.mark.parametrize("slot", [6, 7])
def test_kv_lengths_of_trt_attention_in_the_documented_slot(slot):
    def with_lengths(slot):
        inputs = [("q", FP16, [2, 4, 1, 64]), ("k", FP16, [2, 2, 8, 64]), ("v", FP16, [2, 2, 8, 64]), ("n", INT32, [2])]
        names = ["q", "k", "v", *[""] * (slot - 3), "n"]
        nodes = [node("TRT_Attention", names, ["y"], name="attend", domain="trt")]
        return model(nodes, inputs, [("y", FP16, [2, 4, 1, 64])], domains=("trt",))

    dropped, right = trt_probe.parse(with_lengths(slot)), trt_probe.parse(with_lengths(5))
    assert not dropped.errors and dropped.readers("n") == []
    assert [layer.kind for layer in right.readers("n")] == ["ATTENTION_INPUT"]
    assert rules(with_lengths(slot), lowered=True) == {"trt-attention-kv-lengths"}
    assert rules(with_lengths(5), lowered=True) == set()


IO = [("c", BOOL, []), ("q", FP32, [2, 4, 1, 64]), ("k", FP32, [2, 2, 8, 64]), ("v", FP32, [2, 2, 8, 64])]


def branch(name, operator, *inputs, kind=FP16, **attributes):
    nodes = [node(operator, list(inputs), [f"{name}_y"], name=name, **attributes)]
    return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(f"{name}_y", kind, [2, 4, 1, 64])])


def inside_if(kind):
    then, other = branch("then", "Attention", "q", "k", "v", kind=kind), branch("else", "Identity", "q", kind=kind)
    inputs = [(name, kind if name != "c" else BOOL, shape) for name, _, shape in IO]
    nodes = [node("If", ["c"], ["y"], then_branch=then, else_branch=other)]
    return model(nodes, inputs, [("y", kind, [2, 4, 1, 64])])


def inside_loop(kind):
    body = helper.make_graph(
        [node("Attention", ["x", "k", "v"], ["x_out"]), node("Identity", ["go"], ["go_out"])],
        "body",
        [helper.make_tensor_value_info(*i) for i in (("i", INT64, []), ("go", BOOL, []), ("x", kind, [2, 4, 1, 64]))],
        [helper.make_tensor_value_info(*o) for o in (("go_out", BOOL, []), ("x_out", kind, [2, 4, 1, 64]))],
    )
    inputs = [(name, kind if name != "c" else BOOL, shape) for name, _, shape in IO]
    nodes = [node("Loop", ["n", "c", "q"], ["y"], body=body)]
    return model(nodes, inputs, [("y", kind, [2, 4, 1, 64])], {"n": np.array(3)})


@pytest.mark.parametrize("wrap", [inside_if, inside_loop])
def test_attention_in_a_subgraph(wrap):
    draw = np.random.default_rng(0).standard_normal
    feeds = {name: draw(shape).astype(np.float32) for name, kind, shape in IO if kind == FP32}
    assert np.isfinite(run(wrap(FP32), c=np.array(True), **feeds)).all()  # ONNX Runtime runs it
    plan, reason = trt_probe.build(wrap(FP16))
    assert plan is None and "unknown input tensor" in reason
    assert rules(wrap(FP16)) == {"attention-in-subgraph"}


def test_a_subgraph_without_attention_is_clean():
    then, other = branch("then", "Abs", "q"), branch("else", "Neg", "q")
    fixed = model(
        [node("If", ["c"], ["y"], then_branch=then, else_branch=other)],
        [("c", BOOL, []), ("q", TensorProto.FLOAT16, [2, 4, 1, 64])],
        [("y", FP16, [2, 4, 1, 64])],
    )
    assert trt_probe.build(fixed)[0]
    assert rules(fixed) == set()
