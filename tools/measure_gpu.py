"""A package's engine on this machine's GPU against the package on ONNX Runtime.

    python tools/measure_gpu.py CHECKPOINT TEXT FOLDER [RECIPE]

Teacher-forced agreement and perplexity over 2,048 tokens, 8 × 24 greedy tokens, tokens/s of the plain token loop.
"""

import sys
import time
from pathlib import Path

import numpy as np
import provenance

sys.path.insert(0, str(Path(__file__).parents[1]))
from llmtrt import LLM, SamplingParams, build, quantize  # noqa: E402
from llmtrt.engine.gpu import find_gpus  # noqa: E402
from llmtrt.evaluate.perplexity import perplexity  # noqa: E402

TOKENS, NEW = 2048, 24


def main() -> None:
    checkpoint, text, folder = sys.argv[1], Path(sys.argv[2]).read_text(), Path(sys.argv[3])
    recipe = sys.argv[4] if len(sys.argv) > 4 else "int4-g64"
    package = quantize(checkpoint, folder / "package", recipe).package
    built = build(package.path, folder / "engine", max_batch=8, max_seq=2048)
    found = find_gpus()
    results = {
        "gpu": found.gpus[0].name,
        "driver": found.driver,
        "flavor": f"{built.engine.flavor} {built.engine.flavor_version}",
        "recipe": recipe,
        "build_seconds": round(built.seconds, 1),
        "plan_mb": round(built.engine.plan.stat().st_size / 1e6, 1),
        "package_mb": round((package.path / "model.onnx.data").stat().st_size / 1e6, 1),
    }
    start = time.monotonic()
    gpu = LLM(built.engine.path, runtime="tensorrt")
    results["load_seconds"] = round(time.monotonic() - start, 1)
    cpu = LLM(package.path, accuracy_level=1)
    results["runtimes"] = [gpu.runtime, cpu.runtime]
    ids = gpu.encode(text, special=False)[:TOKENS]
    half = TOKENS // 2
    logits = [np.concatenate([llm.logits(ids[:half]), llm.logits(ids[half:])]) for llm in (gpu, cpu)]
    top = [each.argmax(1) for each in logits]
    differing = np.flatnonzero(top[0] != top[1])
    margins = [float(logits[1][row, top[1][row]] - logits[1][row, top[0][row]]) for row in differing]
    results["teacher_forced"] = {
        "tokens": TOKENS,
        "top1_agreement_percent": round(100 * float((top[0] == top[1]).mean()), 2),
        "largest_margin_of_a_disagreement": round(max(margins, default=0.0), 4),
        "largest_error_of_logits": round(float(np.abs(logits[0] - logits[1]).max()), 4),
        "range_of_logits": round(float(np.ptp(logits[1])), 2),
        "perplexity": [round(perplexity(llm, ids)["perplexity"], 4) for llm in (gpu, cpu)],
    }
    prompts = [ids[100 * n : 100 * n + 12 + 5 * n] for n in range(8)]
    params = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)
    greedy = [[done.token_ids for done in llm.generate(prompts, params)] for llm in (gpu, cpu)]
    results["greedy_tokens_equal_before_the_first_difference"] = [
        next((i for i, pair in enumerate(zip(a, b)) if pair[0] != pair[1]), NEW) for a, b in zip(*greedy)
    ]
    long = SamplingParams(max_tokens=128, temperature=0, ignore_eos=True)
    gpu.generate(ids[:512], long)  # kernels are compiled at the first shapes
    done = gpu.generate(ids[:512], long)
    results["plain_loop"] = {
        "prompt": 512,
        "new_tokens": 128,
        "ttft_ms": round(done.ttft * 1e3, 2),
        "tokens_per_s": round(done.tokens_per_second, 1),
    }
    provenance.write(f"gpu-smollm2-{recipe}", results, ("numpy", "onnxruntime", "onnx-ir"))


if __name__ == "__main__":
    main()
