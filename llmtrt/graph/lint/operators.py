"""Rules of single operators that TensorRT's parser does not take, or not so."""

from collections.abc import Iterator

from llmtrt.graph.lint.finding import Finding, Rule
from llmtrt.graph.lint.subject import STANDARD, Subject, attribute, tensor_input

DOMAIN = Rule(
    "custom-domain",
    "error",
    "every operator is a standard one, or a local function of such",
    "only a runtime that knows the operator runs it: TensorRT-RTX imports com.microsoft's MatMulNBits and "
    "GroupQueryAttention only to ask for a plugin that is not there",
    "write it in standard operators: DequantizeLinear and MatMul, TensorScatter and Attention",
)
TRT_OPERATOR = Rule(
    "trt-operator",
    "warning",
    "a package has no operators that TensorRT alone knows",
    "ONNX Runtime refuses to load the model",
    "write it in standard operators, and leave TensorRT's to a lowering",
    package_only=True,
)
ONEHOT = Rule(
    "onehot-depth",
    "error",
    "the depth of OneHot is fixed when TensorRT builds",
    'TensorRT-RTX\'s compiler fails ("Depth input must be a build time constant"), or it crashes',
    "make the depth an initializer, or compare with a Range: Equal(Unsqueeze(indices), range)",
)
SCATTER = Rule(
    "scatter-reduction",
    "error",
    "ScatterElements and ScatterND overwrite and do not reduce",
    "TensorRT's parser rejects a reduction",
    "use reduction=none on distinct indices, or a one-hot MatMul",
)
TOPK = Rule(
    "topk-limit",
    "error",
    "k of TopK is at most 3840",
    "TensorRT refuses to build a larger one",
    "sample from the whole vocabulary by Gumbel-max (ArgMax) instead",
)
RULES = (DOMAIN, TRT_OPERATOR, ONEHOT, SCATTER, TOPK)

_MOST = 3840


def check(subject: Subject) -> Iterator[Finding]:
    for node in subject.all_nodes:
        if node.op_type.startswith("TRT_"):
            yield TRT_OPERATOR.at(node)
        elif node.domain not in STANDARD and node.op_identifier() not in subject.model.functions:
            yield DOMAIN.at(node, f"{node.domain}.{node.op_type}")
    for node in subject.nodes("OneHot"):
        if not subject.is_fixed(tensor_input(node, 1)):
            yield ONEHOT.at(node)
    for node in subject.nodes("ScatterElements", "ScatterND"):
        if (reduction := attribute(node, "reduction", "none")) != "none":
            yield SCATTER.at(node, f"reduction={reduction}")
    for node in subject.nodes("TopK"):
        k = subject.values(tensor_input(node, 1))
        if k is not None and k.max(initial=0) > _MOST:
            yield TOPK.at(node, f"k = {k.max()}")
