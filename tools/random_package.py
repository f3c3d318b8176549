"""A package of a published model's shape with random INT4 weights, for measurements of speed and memory.

    python tools/random_package.py {8b,1b} PACKAGE [LAYERS]

The weights come from a seed and are written as they are drawn, so that the 8B shape takes seconds and no checkpoint.
"""

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).parents[1]))
import llmtrt.package as packages  # noqa: E402
from llmtrt.files import staged_folder  # noqa: E402
from llmtrt.graph.decoder import write_decoder  # noqa: E402
from llmtrt.graph.weights import Int4, Plain  # noqa: E402
from llmtrt.manifest import write_manifest  # noqa: E402
from llmtrt.models import decoder_of  # noqa: E402
from llmtrt.quantization.weight_file import NUMPY, WeightFile  # noqa: E402

BLOCK = 128
SHAPES = {
    # Llama-3-8B and Llama-3.2-1B
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128},
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
}
COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


class RandomWeights:
    """The graph writer's Weights: INT4 projections of standard deviation 0.02, plain vocabulary or (``int4_head``) a head in
    INT4, norms of ones."""

    def __init__(self, file: WeightFile, tied: bool, seed: int, int4_head: bool):
        self._file, self.head_is_table, self._int4_head = file, tied and not int4_head, int4_head
        rng = np.random.default_rng(seed)
        self._bytes = rng.integers(0, 256, 1 << 24, np.uint8)
        self._normal = (rng.standard_normal(1 << 24, np.float32) * 0.02).astype(np.float16)
        self._rng, self._tables = rng, {}

    def _draw(self, source: np.ndarray, count: int) -> np.ndarray:
        """``count`` elements that start at another place of ``source`` each time: drawing each anew takes minutes."""
        shift = int(self._rng.integers(len(source)))
        return np.resize(np.roll(source, shift), count)

    def linear(self, name: str, k: int, n: int) -> Int4 | Plain:
        if name == "lm_head.weight" and not self._int4_head:
            return self.table(name, n, k)
        q = self._file.append(name, self._draw(self._bytes, k * n // 2), ir.DataType.INT4, (k, n))
        scale = np.full((k // BLOCK, n), 0.02 / 4.6, np.float16)
        return Int4(q, self._file.append(f"{name}_scale", scale), BLOCK)

    def table(self, name: str, rows: int, columns: int) -> Plain:
        if name not in self._tables:
            values = self._draw(self._normal, rows * columns).reshape(rows, columns)
            self._tables[name] = Plain(self._file.append(name, values))
        return self._tables[name]

    def vector(self, name: str, length: int, dtype: ir.DataType, offset: float = 0.0) -> ir.ExternalTensor:
        return self._file.append(name, np.ones(length, NUMPY["float32" if dtype == ir.DataType.FLOAT else "float16"]))


def write(
    folder: Path, shape: str, layers: int | None = None, seed: int = 0, int4_head: bool = False
) -> packages.Package:
    config = COMMON | SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    decoder = decoder_of(config, shape, None, ())
    with staged_folder(folder) as staging:
        with WeightFile(staging, packages.WEIGHTS) as file:
            model = write_decoder(decoder, RandomWeights(file, decoder.tied, seed, int4_head), "float16")
        ir.save(model, staging / packages.GRAPH)
        spec = packages.ModelSpec(
            decoder.family,
            len(decoder.layers),
            decoder.kv_heads,
            decoder.head_dim,
            decoder.vocab_size,
            decoder.max_seq,
            "float16",
            "float16",
            config["bos_token_id"],
            (config["eos_token_id"],),
        )
        source = {"shape": shape, "layers": len(decoder.layers), "seed": seed, "int4_head": int4_head}
        fields = {"model": spec.to_json(), "generation": {}, "source": source, "recipe": {}, "quantization": {}}
        write_manifest(staging, packages.PACKAGE, fields)
    return packages.open_package(folder, verify=False)


if __name__ == "__main__":
    write(Path(sys.argv[2]), sys.argv[1], int(sys.argv[3]) if len(sys.argv) > 3 else None)
