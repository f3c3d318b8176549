"""Peak memory of `llmtrt quantize` on random checkpoints of one width with 16 and 32 layers (Llama-3.2-1B's shape).

    python tools/measure_memory.py FOLDER    # needs 7 GB of disk there

It should not grow with the number of layers: one tensor is in memory at a time.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import provenance

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 2048, 8192, 32, 8, 64, 128256


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    found = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for i in range(layers):
        p = f"model.layers.{i}"
        found |= {
            f"{p}.input_layernorm.weight": (HIDDEN,),
            f"{p}.post_attention_layernorm.weight": (HIDDEN,),
            f"{p}.self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
            f"{p}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
            f"{p}.self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{p}.self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{p}.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{p}.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{p}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        }
    return found


def write_checkpoint(folder: Path, layers: int) -> None:
    """A random bf16 checkpoint, written a tensor at a time: it would not fit twice in memory as transformers makes it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps(
            dict(
                architectures=["LlamaForCausalLM"],
                model_type="llama",
                hidden_size=HIDDEN,
                intermediate_size=INTERMEDIATE,
                num_hidden_layers=layers,
                num_attention_heads=HEADS,
                num_key_value_heads=KV_HEADS,
                head_dim=HEAD_DIM,
                vocab_size=VOCABULARY,
                max_position_embeddings=4096,
                rms_norm_eps=1e-5,
                tie_word_embeddings=True,
                hidden_act="silu",
                rope_theta=500000.0,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
    )
    header, offset = {}, 0
    for name, shape in shapes(layers).items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    block = (rng.standard_normal(1 << 22) * 0.02).astype(ml_dtypes.bfloat16)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes(layers).values():
            left = int(np.prod(shape))
            while left:
                taken = min(left, len(block))
                block[:taken].tofile(file)
                left -= taken


def main() -> None:
    folder, results = Path(sys.argv[1]), {}
    for layers in (16, 32):
        checkpoint, package = folder / f"checkpoint-{layers}", folder / f"package-{layers}"
        write_checkpoint(checkpoint, layers)
        start = time.monotonic()
        run = subprocess.Popen(
            [sys.executable, "-m", "llmtrt", "quantize", str(checkpoint), "-o", str(package)],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        )
        _, status, usage = os.wait4(run.pid, 0)
        if status:
            sys.exit(f"quantize ended with status {status}")
        results[f"{layers} layers"] = {
            "peak_rss_gb": round(usage.ru_maxrss * 1024 / 1e9, 3),
            "seconds": round(time.monotonic() - start, 1),
            "checkpoint_gb": round((checkpoint / "model.safetensors").stat().st_size / 1e9, 2),
            "package_gb": round((package / "model.onnx.data").stat().st_size / 1e9, 2),
        }
        shutil.rmtree(checkpoint)
        shutil.rmtree(package)
    peaks = [result["peak_rss_gb"] for result in results.values()]
    results["ratio of peaks"] = round(peaks[1] / peaks[0], 3)
    provenance.write("quantize-memory", results, ("numpy", "onnx-ir"))


if __name__ == "__main__":
    main()
