"""A checkpoint of a published model's shape with random bf16 weights, written a tensor at a time.

python tools/random_checkpoint.py {8b,1b} CHECKPOINT [LAYERS]
"""

import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from random_package import COMMON, SHAPES


def config_of(shape: str, layers: int | None = None) -> dict:
    return COMMON | SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    hidden, intermediate, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    width, kv_width = (config[f"num_{each}_heads"] * config["head_dim"] for each in ("attention", "key_value"))
    found = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (vocabulary, hidden)
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}"
        found |= {
            f"{p}.input_layernorm.weight": (hidden,),
            f"{p}.post_attention_layernorm.weight": (hidden,),
            f"{p}.self_attn.q_proj.weight": (width, hidden),
            f"{p}.self_attn.o_proj.weight": (hidden, width),
            f"{p}.self_attn.k_proj.weight": (kv_width, hidden),
            f"{p}.self_attn.v_proj.weight": (kv_width, hidden),
            f"{p}.mlp.gate_proj.weight": (intermediate, hidden),
            f"{p}.mlp.up_proj.weight": (intermediate, hidden),
            f"{p}.mlp.down_proj.weight": (hidden, intermediate),
        }
    return found


def write(folder: Path, shape: str, layers: int | None = None) -> None:
    """Matrices of standard deviation 0.02, norms of ones; one drawn block fills all, so that 8B take a minute."""
    folder.mkdir(parents=True)
    config = config_of(shape, layers)
    (folder / "config.json").write_text(json.dumps(config))
    shapes, header, offset = tensor_shapes(config), {}, 0
    for name, size in shapes.items():
        end = offset + 2 * int(np.prod(size))
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    # of a prime length, so that no two rows are the same
    drawn = (np.random.default_rng(0).standard_normal(4_194_301) * 0.02).astype(ml_dtypes.bfloat16)
    ones = np.ones(len(drawn), ml_dtypes.bfloat16)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for size in shapes.values():
            block, left = (drawn if len(size) == 2 else ones), int(np.prod(size))
            while left:
                taken = min(left, len(block))
                block[:taken].tofile(file)
                left -= taken


if __name__ == "__main__":
    write(Path(sys.argv[2]), sys.argv[1], int(sys.argv[3]) if len(sys.argv) > 3 else None)
