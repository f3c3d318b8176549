"""Writes the sampler as a standard ONNX graph that runs behind the decoder: fp32 logits in, the next step's inputs out.

    logits fp32 [B, 1, V]   positions, last_rows int64 [B, 1]
    → tokens, next_ids, next_positions int64 [B, 1]
and unless it is greedy only
    steps int64 [B, 1]   noise fp32 [B, N] in [0, 1)   seen bool [B, V]
    temperature, top_k (0: all), top_p, min_p, repetition_penalty fp32 [B, 1]
    → next_steps int64 [B, 1]   next_seen bool [B, V]

It chooses what ``llmtrt.runtime.sampling.Sampler`` chooses: repetition penalty (Keskar et al. 2019, arXiv:1909.05858),
temperature, top_k, top_p (Holtzman et al. 2019, arXiv:1904.09751), min_p, then the first token in the order of ids whose
cumulative weight passes noise[step] of the sum; where temperature is 0, the likeliest token. But it adds up in fp32, which
rounds off as much as a very unlikely token weighs, so that where nothing cuts those off, 2 of 1000 tokens are the neighbour
in their order (SmolLM2).

No TopK: the borders of top_k and top_p are found by bisection. On an H100 with V = 128256 (TensorRT-RTX, a CUDA graph,
batch 1) 32 rounds take 126 µs for any k, where TopK takes 438 for k = 64 and 6200 for k = 3840, its most. Reductions
go over blocks of about V / 128 and then over those, in half the time of one over V; so does the cumulative sum (16 µs, not
136). Blocks are a multiple of 128 long: those of 1,002 are read number by number, not four at once, and the whole graph then
takes 521 µs, not 289, and for 64 sequences 15 ms, not 4.5 (benchmarks/gpu-sampler.json).
"""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from llmtrt.graph.builder import GraphBuilder

FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL

_BLOCKS, _ALIGNED = 128, 128  # at most so many, of multiples of so many
_ROUNDS = 32
_LEAST = -110.0  # the exponential of less is 0 in fp32
_LARGEST = float(np.finfo(np.float32).max)


def write_sampler(vocab_size: int, greedy_only: bool = False) -> ir.Model:
    """The graph for a vocabulary of ``vocab_size``; B and N are symbolic.

    ``tokens`` is −1 where the scores are not numbers (one is NaN, or the largest is infinite), which is a UserError on
    the host, and ``next_ids`` then 0. ``next_positions`` = min(positions + 1, last_rows) and ``next_steps`` =
    min(steps + 1, N − 1), so that an idle slot stays within its cache and its noise.
    """
    g = GraphBuilder("sampler")
    logits = g.input("logits", FLOAT, ["B", 1, vocab_size])
    positions, last_rows = (g.input(name, INT64, ["B", 1]) for name in ("positions", "last_rows"))
    scores = g.op("Squeeze", logits, g.constant([1]))
    if not greedy_only:
        steps, noise = g.input("steps", INT64, ["B", 1]), g.input("noise", FLOAT, ["B", "N"])
        seen = g.input("seen", BOOL, ["B", vocab_size])
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        temperature, *limits, penalty = (g.input(name, FLOAT, ["B", 1]) for name in names)
        scores = _penalized(g, scores, seen, penalty)
    width = -(-vocab_size // _BLOCKS // _ALIGNED) * _ALIGNED
    count = -(-vocab_size // width)
    blocks = _in_blocks(g, scores, vocab_size, count, width)
    highest = g.op("ReduceMax", blocks, g.constant([2]))
    top = g.op("ReduceMax", highest, g.constant([1]))
    tokens = _likeliest(g, blocks, highest, width)
    if not greedy_only:
        weights = _weights(g, blocks, top, temperature, *limits, vocab_size)
        drawn = _draw(g, weights, g.op("GatherElements", noise, steps, axis=1), count, width)
        tokens = g.op("Where", g.op("Greater", temperature, _float(g, 0)), drawn, tokens)
    tokens = g.op("Where", _are_numbers(g, blocks, top), tokens, g.constant(-1))
    one = g.constant(1)
    g.output(tokens, "tokens", INT64, ["B", 1])
    g.output(g.op("Max", tokens, g.constant(0)), "next_ids", INT64, ["B", 1])
    g.output(g.op("Min", g.op("Add", positions, one), last_rows), "next_positions", INT64, ["B", 1])
    if not greedy_only:
        last_step = g.op("Sub", g.op("Shape", noise, start=1), one)
        g.output(g.op("Min", g.op("Add", steps, one), last_step), "next_steps", INT64, ["B", 1])
        chosen = g.op("Equal", g.op("Range", *map(g.constant, (0, vocab_size, 1))), tokens)
        g.output(g.op("Or", seen, chosen), "next_seen", BOOL, ["B", vocab_size])
    return g.model()


def _penalized(g: GraphBuilder, scores: ir.Value, seen: ir.Value, penalty: ir.Value) -> ir.Value:
    """``scores`` [B, V] with the repetition ``penalty`` [B, 1] where ``seen`` [B, V]."""
    with g.scope("penalty"):
        is_negative = g.op("Less", scores, _float(g, 0))
        smaller = g.op("Where", is_negative, g.op("Mul", scores, penalty), g.op("Div", scores, penalty))
        return g.op("Where", seen, smaller, scores)


def _in_blocks(g: GraphBuilder, scores: ir.Value, vocab_size: int, count: int, width: int) -> ir.Value:
    """``scores`` [B, V] as [B, count, width], filled up with −inf."""
    if missing := count * width - vocab_size:
        scores = g.op("Pad", scores, g.constant([0, 0, 0, missing]), _float(g, -np.inf))
    return g.op("Reshape", scores, g.constant([0, count, width]))


def _likeliest(g: GraphBuilder, blocks: ir.Value, highest: ir.Value, width: int) -> ir.Value:
    """int64 [B, 1]: the place of the first of the largest of ``blocks`` [B, C, width], of each of which the ``highest``
    [B, C, 1] is known: of 16 × 128,256 in 10 µs, where one ArgMax takes 68 (H100)."""
    with g.scope("likeliest"):
        block = g.op("Squeeze", g.op("ArgMax", highest, axis=1), g.constant([2]))
        place = g.op("GatherElements", g.op("ArgMax", blocks, axis=2, keepdims=0), block, axis=1)
        return g.op("Add", g.op("Mul", block, g.constant(width)), place)


def _are_numbers(g: GraphBuilder, blocks: ir.Value, top: ir.Value) -> ir.Value:
    """bool [B, 1]: no score is NaN and the largest is finite, whatever ``top`` is where one is NaN."""
    with g.scope("numbers"):
        ordered = g.op("Cast", g.op("LessOrEqual", blocks, top), to=int(FLOAT))
        all_ordered = g.op("Equal", _reduce(g, "ReduceMin", ordered), _float(g, 1))
        is_finite = g.op("LessOrEqual", g.op("Abs", top), _float(g, _LARGEST))
        return g.op("Squeeze", g.op("And", all_ordered, is_finite), g.constant([2]))


def _weights(
    g: GraphBuilder,
    blocks: ir.Value,
    top: ir.Value,
    temperature: ir.Value,
    top_k: ir.Value,
    top_p: ir.Value,
    min_p: ir.Value,
    vocab_size: int,
) -> ir.Value:
    """Probabilities over that of the likeliest token, [B, C, width]; 0 outside of top_k, top_p and min_p."""
    axis, zero = g.constant([2]), _float(g, 0)
    temperature, top_k, top_p, min_p = (g.op("Unsqueeze", x, axis) for x in (temperature, top_k, top_p, min_p))
    # Before the division, as on the host: a tiny temperature then gives 0 and -inf, never NaN.
    x = g.op("Div", g.op("Sub", blocks, top), g.op("Max", temperature, _float(g, 1e-30)))
    weights = g.op("Exp", x)
    # Bisecting the exponent leaves a weight's relative error at 110 / 2³², where its own value would an absolute one.
    least = _reduce(g, "ReduceMin", g.op("Where", g.op("GreaterOrEqual", x, _float(g, _LEAST)), x, zero))

    with g.scope("top_k"):
        k = g.op("Where", g.op("Greater", top_k, zero), top_k, _float(g, vocab_size))

        def reaches_k(kept: ir.Value) -> ir.Value:
            return g.op("GreaterOrEqual", _reduce(g, "ReduceSum", g.op("Cast", kept, to=int(FLOAT))), k)

        weights = g.op("Where", g.op("GreaterOrEqual", x, _border(g, x, least, reaches_k)), weights, zero)

    with g.scope("top_p"):
        share = g.op("Mul", top_p, _reduce(g, "ReduceSum", weights))

        def reaches_p(kept: ir.Value) -> ir.Value:
            return g.op("GreaterOrEqual", _reduce(g, "ReduceSum", g.op("Where", kept, weights, zero)), share)

        # A top_p of 1 loses no more than fp32 rounds off the sum, which no noise reaches.
        weights = g.op("Where", g.op("GreaterOrEqual", x, _border(g, x, least, reaches_p)), weights, zero)

    with g.scope("min_p"):
        return g.op("Where", g.op("GreaterOrEqual", weights, min_p), weights, zero)


def _border(g: GraphBuilder, x: ir.Value, least: ir.Value, reaches: Callable[[ir.Value], ir.Value]) -> ir.Value:
    """The largest number from ``least`` to 0 whose tokens (bool [B, C, width]: x at least the number) ``reaches`` says to
    be enough (bool [B, 1, 1]), ``least`` where none are; short by at most −least / 2³²."""
    low, high = least, _float(g, 0)
    for _ in range(_ROUNDS):
        middle = g.op("Mul", g.op("Add", low, high), _float(g, 0.5))
        enough = reaches(g.op("GreaterOrEqual", x, middle))
        low, high = g.op("Where", enough, middle, low), g.op("Where", enough, high, middle)
    return low


def _draw(g: GraphBuilder, weights: ir.Value, noise: ir.Value, count: int, width: int) -> ir.Value:
    """int64 [B, 1]: where the running sum of ``weights`` [B, count, width] passes ``noise`` [B, 1] of their sum."""
    with g.scope("draw"):
        sums = g.op("ReduceSum", weights, g.constant([2]), keepdims=0)
        rest = g.op("Mul", noise, g.op("ReduceSum", sums, g.constant([1])))
        before = g.op("CumSum", sums, g.constant(1), exclusive=1)
        block = _first_past(g, sums, g.op("Add", before, sums), rest, count)
        rest = g.op("Sub", rest, g.op("GatherElements", before, block, axis=1))
        row = g.op("GatherND", weights, block, batch_dims=1)
        place = _first_past(g, row, g.op("CumSum", row, g.constant(1)), rest, width)
        return g.op("Add", g.op("Mul", block, g.constant(width)), place)


def _first_past(g: GraphBuilder, weights: ir.Value, sums: ir.Value, rest: ir.Value, width: int) -> ir.Value:
    """int64 [B, 1]: the first place with a weight [B, width] whose running sum is more than ``rest`` [B, 1], or the last
    with a weight: sums that are added in another order may differ in their last bit, even over zeros."""
    places = _arange(g, width)
    weighs = g.op("Greater", weights, _float(g, 0))
    passes = g.op("And", weighs, g.op("Greater", sums, rest))
    first = g.op("ReduceMin", g.op("Where", passes, places, _float(g, width)), g.constant([1]))
    last = g.op("ReduceMax", g.op("Where", weighs, places, _float(g, 0)), g.constant([1]))
    return g.op("Cast", g.op("Min", first, last), to=int(INT64))


def _reduce(g: GraphBuilder, kind: str, blocks: ir.Value) -> ir.Value:
    """``blocks`` [B, C, width] reduced to [B, 1, 1], in two stages."""
    return g.op(kind, g.op(kind, blocks, g.constant([2])), g.constant([1]))


def _float(g: GraphBuilder, value: float) -> ir.Value:
    return g.constant(value, np.float32)


def _arange(g: GraphBuilder, count: int) -> ir.Value:
    return g.op("Range", *(_float(g, x) for x in (0, count, 1)))
