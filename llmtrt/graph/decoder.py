"""Writes a Decoder as one strongly typed ONNX graph of standard operators: the contract of the package.

    input_ids, positions  int64 [B, S]   logits_index int64 [B, K]   kv_range int64 [L] = 0 … L − 1
    past_key_i, past_value_i → present_key_i, present_value_i  [B, Hkv, capacity, D], in place
    logits  fp32 [B, K, V]

The residual stream, norms and rotary angles are fp32 in every package: Gemma 3's residual reaches 103,792, past fp16.
"""

import numpy as np
import onnx_ir as ir

from llmtrt.graph import attention as att
from llmtrt.graph.builder import DTYPES, GraphBuilder
from llmtrt.graph.linear import embedding, linear, plain_product
from llmtrt.graph.weights import Weights
from llmtrt.models.decoder import Decoder

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
EMBEDDING = "model.embed_tokens"


def write_decoder(d: Decoder, weights: Weights, dtype: str) -> ir.Model:
    """The graph of ``d`` with projections and KV cache in ``dtype`` (float16, bfloat16 or float32)."""
    return _Writer(d, weights, DTYPES[dtype]).write()


class _Writer:
    def __init__(self, d: Decoder, weights: Weights, dtype: ir.DataType):
        self.d, self.weights, self.dtype, self.g = d, weights, dtype, GraphBuilder(d.family)

    def write(self) -> ir.Model:
        d, g = self.d, self.g
        ids, positions = g.input("input_ids", INT64, ["B", "S"]), g.input("positions", INT64, ["B", "S"])
        wanted, kv_range = g.input("logits_index", INT64, ["B", "K"]), g.input("kv_range", INT64, ["L"])
        cache_shape = ["B", d.kv_heads, "capacity", d.head_dim]
        pasts = [
            [g.input(f"past_{which}_{i}", self.dtype, cache_shape) for which in ("key", "value")]
            for i in range(len(d.layers))
        ]
        with g.scope("model"):
            self.angles = [att.rope_angles(g, positions, rope, f"rope_{i}") for i, rope in enumerate(d.ropes)]
            windows = dict.fromkeys(layer.window for layer in d.layers)
            self.masks = {window: att.attention_mask(g, positions, kv_range, window) for window in windows}
            self.write_at = g.op(
                "Squeeze", g.op("Slice", positions, *map(g.constant, ([0], [1], [1]))), g.constant([1])
            )
            self.length = g.op("Shape", kv_range)
        x = embedding(g, self.weights, ids, EMBEDDING, d.vocab_size, d.hidden, self.dtype)
        if d.embedding_scale != 1.0:
            with g.scope(EMBEDDING):
                x = g.op("Mul", x, g.constant(d.embedding_scale, np.float32))
        presents = []
        for index, past in enumerate(pasts):
            x, present = self.layer(x, index, past)
            presents.append(present)
        logits = self.head(x, wanted)
        g.output(logits, "logits", FLOAT, ["B", "K", d.vocab_size])
        for index, present in enumerate(presents):
            for which, value in zip(("key", "value"), present):
                g.output(value, f"present_{which}_{index}", self.dtype, cache_shape)
        return g.model()

    def layer(self, x: ir.Value, index: int, past: list[ir.Value]) -> tuple[ir.Value, list[ir.Value]]:
        d, g, prefix = self.d, self.g, f"model.layers.{index}"
        y, present = self.attention(self.norm(x, f"{prefix}.input_layernorm"), index, past)
        if d.post_norms:
            y = self.norm(y, f"{prefix}.post_attention_layernorm", self.dtype, FLOAT)
        else:
            y = g.cast(y, self.dtype, FLOAT)
        with g.scope(prefix):
            x = g.op("Add", x, y)
        before = "pre_feedforward_layernorm" if d.post_norms else "post_attention_layernorm"
        y = self.mlp(self.norm(x, f"{prefix}.{before}"), f"{prefix}.mlp")
        if d.post_norms:
            y = self.norm(y, f"{prefix}.post_feedforward_layernorm", self.dtype, FLOAT)
        else:
            y = g.cast(y, self.dtype, FLOAT)
        with g.scope(prefix):
            return g.op("Add", x, y), present

    def attention(self, x: ir.Value, index: int, past: list[ir.Value]) -> tuple[ir.Value, list[ir.Value]]:
        d, g, layer, prefix = self.d, self.g, self.d.layers[index], f"model.layers.{index}.self_attn"
        width, kv_width = d.heads * d.head_dim, d.kv_heads * d.head_dim
        if d.packed:
            packed = self.linear(x, f"{prefix}.qkv_proj", d.hidden, width + 2 * kv_width, d.qkv_bias)
            with g.scope(prefix):
                q, k, v = self.split(packed, [0, width, width + kv_width, width + 2 * kv_width])
        else:
            q = self.linear(x, f"{prefix}.q_proj", d.hidden, width, d.qkv_bias)
            k = self.linear(x, f"{prefix}.k_proj", d.hidden, kv_width, d.qkv_bias)
            v = self.linear(x, f"{prefix}.v_proj", d.hidden, kv_width, d.qkv_bias)
        with g.scope(prefix):
            q, k, v = (
                att.split_heads(g, t, h, d.head_dim) for t, h in ((q, d.heads), (k, d.kv_heads), (v, d.kv_heads))
            )
        source = self.dtype
        if d.qk_norm:
            q = self.norm(q, f"{prefix}.q_norm", self.dtype, FLOAT, d.head_dim)
            k = self.norm(k, f"{prefix}.k_norm", self.dtype, FLOAT, d.head_dim)
            source = FLOAT
        with g.scope(prefix):
            q, k, v = (g.op("Transpose", t, perm=[0, 2, 1, 3]) for t in (q, k, v))
            rotary_dim = 2 * len(d.ropes[layer.rope].inv_freq)
            q, k = (
                att.rotate(g, t, self.angles[layer.rope], rotary_dim, d.head_dim, source, self.dtype) for t in (q, k)
            )
            present = [
                att.update_cache(g, index, which, old, new, self.write_at)
                for which, old, new in zip(("key", "value"), past, (k, v))
            ]
            y = att.attend(g, q, *present, self.masks[layer.window], self.length, d.attention_scale, width)
        return self.linear(y, f"{prefix}.o_proj", width, d.hidden, d.o_bias), present

    def mlp(self, x: ir.Value, prefix: str) -> ir.Value:
        d, g = self.d, self.g
        if d.packed:
            packed = self.linear(x, f"{prefix}.gate_up_proj", d.hidden, 2 * d.intermediate, d.mlp_bias)
            with g.scope(prefix):
                gate, up = self.split(packed, [0, d.intermediate, 2 * d.intermediate])
        else:
            gate = self.linear(x, f"{prefix}.gate_proj", d.hidden, d.intermediate, d.mlp_bias)
            up = self.linear(x, f"{prefix}.up_proj", d.hidden, d.intermediate, d.mlp_bias)
        with g.scope(prefix):
            if d.activation == "silu":
                gate = g.op("Mul", gate, g.op("Sigmoid", gate))
            else:
                gate = g.op("Gelu", gate, approximate="tanh" if d.activation == "gelu_tanh" else "none")
            y = g.op("Mul", gate, up)
        return self.linear(y, f"{prefix}.down_proj", d.intermediate, d.hidden, d.mlp_bias)

    def head(self, x: ir.Value, wanted: ir.Value) -> ir.Value:
        d, g = self.d, self.g
        with g.scope("lm_head"):
            rows = g.op("GatherND", x, g.op("Unsqueeze", wanted, g.constant([2])), batch_dims=1)
        rows = self.norm(rows, "model.norm")
        if d.tied and self.weights.head_is_table:
            with g.scope("lm_head"):
                table = self.weights.table(f"{EMBEDDING}.weight", d.vocab_size, d.hidden)
                logits = plain_product(g, rows, table, d.hidden, d.vocab_size)
        else:
            logits = self.linear(rows, "lm_head", d.hidden, d.vocab_size, False)
        with g.scope("lm_head"):
            logits = g.cast(logits, self.dtype, FLOAT)
            if d.logit_softcap is not None:
                cap = g.constant(d.logit_softcap, np.float32)
                logits = g.op("Mul", g.op("Tanh", g.op("Div", logits, cap)), cap)
            return logits

    def norm(
        self,
        x: ir.Value,
        name: str,
        source: ir.DataType = FLOAT,
        target: ir.DataType | None = None,
        length: int | None = None,
    ) -> ir.Value:
        """RMSNorm (https://arxiv.org/abs/1910.07467) in fp32 over the last axis, from type ``source`` to ``target``."""
        with self.g.scope(name):
            weight = self.weights.vector(f"{name}.weight", length or self.d.hidden, FLOAT, self.d.norm_offset)
            y = self.g.op(
                "RMSNormalization",
                self.g.cast(x, source, FLOAT),
                self.g.initializer(weight),
                axis=-1,
                epsilon=self.d.norm_eps,
                stash_type=int(FLOAT),
            )
            return self.g.cast(y, FLOAT, target or self.dtype)

    def linear(self, x: ir.Value, name: str, k: int, n: int, bias: bool) -> ir.Value:
        return linear(self.g, self.weights, x, name, k, n, self.dtype, bias)

    def split(self, x: ir.Value, bounds: list[int]) -> list[ir.Value]:
        return [
            self.g.op("Slice", x, *map(self.g.constant, ([start], [end], [2])))
            for start, end in zip(bounds, bounds[1:])
        ]
