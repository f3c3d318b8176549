"""Rules of the graph contract (a package's inputs and outputs), for graphs that have a token input or a KV cache."""

from collections.abc import Iterator

import onnx_ir as ir

from llmtrt.graph.lint.finding import Finding, Rule
from llmtrt.graph.lint.subject import Subject, dims, dtype

INPUTS = Rule(
    "contract-inputs",
    "error",
    "a decoder has int64 input_ids [B, S], positions [B, S], logits_index [B, K] and kv_range [L]",
    "the session binds these by name, type and rank",
    "write the graph with `llmtrt quantize`, or name and type its inputs so",
)
LOGITS = Rule(
    "contract-logits",
    "error",
    "a decoder has the fp32 output logits [B, K, V]",
    "the sampler reads fp32; half logits lose the order of close candidates",
    "Cast the logits to float and name the output so",
)
CACHE_PAIRS = Rule(
    "contract-cache-pairs",
    "error",
    "every past_key_i, past_value_i [B, Hkv, capacity, D] has a present_* of the same type and shape, for i = 0, 1, …",
    "the cache is updated in place: both names are bound to one buffer",
    "declare past_* and present_* alike, one pair of keys and one of values a layer",
)
RULES = (INPUTS, LOGITS, CACHE_PAIRS)

_RANKS = {"input_ids": 2, "positions": 2, "logits_index": 2, "kv_range": 1}


def is_decoder(subject: Subject) -> bool:
    return any(
        value.name == "input_ids" or (value.name or "").startswith("past_") for value in subject.model.graph.inputs
    )


def check(subject: Subject) -> Iterator[Finding]:
    if is_decoder(subject):
        inputs = {value.name: value for value in subject.model.graph.inputs}
        outputs = {value.name: value for value in subject.model.graph.outputs}
        yield from _check_inputs(inputs)
        yield from _check_logits(outputs)
        yield from _check_cache(inputs, outputs)


def _check_inputs(inputs: dict[str, ir.Value]) -> Iterator[Finding]:
    for name, rank in _RANKS.items():
        value = inputs.get(name)
        if value is None:
            yield INPUTS.at(name, f"there is no input {name}")
        elif dtype(value) != ir.DataType.INT64 or len(dims(value) or ()) != rank:
            yield INPUTS.at(name, f"input {name} is {_said(value)} instead of INT64 of rank {rank}")
    ids, positions = dims(inputs.get("input_ids")), dims(inputs.get("positions"))
    if ids is not None and positions is not None and ids != positions:
        yield INPUTS.at("positions", f"positions is {list(positions)} where input_ids is {list(ids)}")


def _check_logits(outputs: dict[str, ir.Value]) -> Iterator[Finding]:
    value = outputs.get("logits")
    if value is None:
        yield LOGITS.at("logits", "there is no output logits")
    elif dtype(value) != ir.DataType.FLOAT or len(dims(value) or ()) != 3:
        yield LOGITS.at("logits", f"logits is {_said(value)}")


def _check_cache(inputs: dict[str, ir.Value], outputs: dict[str, ir.Value]) -> Iterator[Finding]:
    pasts = {name: value for name, value in inputs.items() if name.startswith("past_")}
    layers = len(pasts) // 2
    wanted = {f"past_{which}_{index}" for index in range(layers) for which in ("key", "value")}
    if not pasts:
        yield CACHE_PAIRS.at("past_key_0", "there is no KV cache among the inputs")
    for name in sorted(pasts.keys() ^ wanted):
        said = "is missing" if name in wanted else f"does not fit the names of {layers} layers"
        yield CACHE_PAIRS.at(name, f"input {name} {said}")
    for name, past in pasts.items():
        present = outputs.get("present_" + name.removeprefix("past_"))
        if present is None:
            yield CACHE_PAIRS.at(name, f"{name} has no present_{name.removeprefix('past_')} among the outputs")
        elif _said(present) != _said(past):
            yield CACHE_PAIRS.at(present, f"{present.name} is {_said(present)}, {name} is {_said(past)}")
        if len(dims(past) or ()) != 4:
            yield CACHE_PAIRS.at(past, f"{name} is {_said(past)}, not of rank 4")
    for name in outputs.keys() - {"present_" + name.removeprefix("past_") for name in pasts}:
        if name.startswith("present_"):
            yield CACHE_PAIRS.at(name, f"{name} has no past_{name.removeprefix('present_')} among the inputs")


def _said(value: ir.Value) -> str:
    shape = dims(value)
    kind = dtype(value).name if dtype(value) is not None else "of no type"
    return f"{kind} {list(shape) if shape is not None else 'of no shape'}"
