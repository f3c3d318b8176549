"""Perplexity of SmolLM2's packages on ONNX Runtime (accuracy level 1) against transformers in fp32, in one run.

    python tools/measure_quality.py CHECKPOINT TEXT FOLDER

The first 16,384 tokens of the text in windows of 1,024 without overlap, each predicting all its tokens but the first.
"""

import math
import sys
from pathlib import Path

import provenance
import torch
from measure_cpu import transformers_model

sys.path.insert(0, str(Path(__file__).parents[1]))
from llmtrt import LLM, quantize  # noqa: E402
from llmtrt.evaluate.perplexity import perplexity  # noqa: E402

CONTEXT, TOKENS = 1024, 16384


def main() -> None:
    checkpoint, text, folder = sys.argv[1], Path(sys.argv[2]).read_text(), Path(sys.argv[3])
    results = {}
    for recipe in ("fp16", "int4-g64", "int4", "int4-g32", "int4-vocab8"):
        made = quantize(checkpoint, folder / recipe, recipe)
        with LLM(made.package.path, accuracy_level=1) as llm:
            ids = llm.encode(text, special=False)[:TOKENS]
            results[recipe] = {
                "perplexity": round(perplexity(llm, ids, CONTEXT)["perplexity"], 3),
                "bits_per_weight": made.report["bits_per_weight"],
                "package_mb": round((made.package.path / "model.onnx.data").stat().st_size / 1e6, 1),
            }
    model, nll = transformers_model(checkpoint), 0.0
    with torch.no_grad():
        for start in range(0, TOKENS, CONTEXT):
            window = torch.tensor([ids[start : start + CONTEXT]])
            nll += model(window, labels=window).loss.item()
    reference = math.exp(nll * CONTEXT / TOKENS)
    results["transformers fp32"] = {"perplexity": round(reference, 3)}
    for each in results.values():
        each["against_transformers_percent"] = round(100 * (each["perplexity"] / reference - 1), 2)
    results["protocol"] = f"{Path(sys.argv[2]).name}, {TOKENS} tokens, context {CONTEXT}"
    provenance.write("quality-smollm2", results, ("numpy", "onnxruntime", "torch", "transformers"))


if __name__ == "__main__":
    main()
