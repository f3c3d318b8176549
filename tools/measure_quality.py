"""Perplexity and KL divergence of SmolLM2's packages on ONNX Runtime (accuracy level 1), a row for each recipe.

    python tools/measure_quality.py CHECKPOINT DATA FOLDER [ROW…]

DATA has wikitext2-test.txt, wikitext2-train-part.txt, tinyshakespeare.txt and code-sample.txt. Of each text the first 16,384
tokens in windows of 1,024 without overlap, each predicting all its tokens but the first; of the first 4,096, how far each is
from the fp16 package. FOLDER keeps packages and what was
measured, so that rows can be made one by one, by several calls; without rows, all that are missing.
"""

import json
import math
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import provenance

sys.path.insert(0, str(Path(__file__).parents[1]))
from llmtrt import LLM, quantize  # noqa: E402
from llmtrt.checkpoints import open_checkpoint  # noqa: E402
from llmtrt.evaluate.agreement import agreement  # noqa: E402
from llmtrt.evaluate.peer import load_transformers  # noqa: E402
from llmtrt.evaluate.perplexity import perplexity  # noqa: E402
from llmtrt.quantization import layerwise, statistics  # noqa: E402
from llmtrt.quantization.recipe import read_recipe  # noqa: E402

CONTEXT, TOKENS, COMPARED = 1024, 16384, 4096
REFERENCE = "transformers fp32"
TEXTS = ("wikitext2-test.txt", "tinyshakespeare.txt", "code-sample.txt")
TRAIN = "wikitext2-train-part.txt"
GPTQ = read_recipe("gptq-g64")
FEWER = replace(GPTQ, calibration_sequences=32)  # to tell the algorithm's parts apart, in half the time
VOCABULARY = {"embedding": "int8", "lm_head": "int8"}


def without_descent() -> None:
    layerwise.descend = lambda weight, hessian, q, scale, block, dtype: (q, scale)


def with_share(share: float):
    def patch() -> None:
        compensated = statistics.Statistics.compensated
        statistics.Statistics.compensated = lambda self, weight: compensated(self, weight, share)

    return patch


def gptq_alone() -> None:
    without_descent()
    with_share(0.0)()


# row → (recipe, what it is calibrated on, what is left out of the algorithm)
ROWS = {
    "fp16": (read_recipe("fp16"), None, None),
    "rtn g64": (read_recipe("int4-g64"), None, None),
    "rtn g32": (read_recipe("int4-g32"), None, None),
    "rtn g64, int8 vocabulary": (replace(read_recipe("int4-g64"), **VOCABULARY), None, None),
    "gptq g64": (GPTQ, TRAIN, None),
    "gptq g64, calibrated on itself": (GPTQ, "self", None),
    "gptq g64, without descent": (GPTQ, TRAIN, without_descent),
    "gptq g64, calibrated on itself, without descent": (GPTQ, "self", without_descent),
    "gptq, 4.5 bits": (read_recipe("gptq-mixed"), TRAIN, None),
    "gptq g64, 32 sequences": (FEWER, TRAIN, None),
    "gptq g32, 32 sequences": (replace(FEWER, group_size=32), TRAIN, None),
    "gptq, 4.5 bits, 32 sequences": (replace(read_recipe("gptq-mixed"), calibration_sequences=32), TRAIN, None),
    "gptq g64, 32 sequences, int8 vocabulary": (replace(FEWER, **VOCABULARY), TRAIN, None),
    "gptq g64, 32 sequences, without descent": (FEWER, TRAIN, without_descent),
    "gptq g64, 32 sequences, without compensation": (FEWER, TRAIN, with_share(0.0)),
    "gptq g64, 32 sequences, with all of the compensation": (FEWER, TRAIN, with_share(1.0)),
    "gptq g64, 32 sequences, without either": (FEWER, TRAIN, gptq_alone),
}


def make(checkpoint: str, data: Path, row: str, package: Path) -> dict:
    """In a process of its own: what is left out stays out, and the peak is this row's."""
    recipe, calibration, patch = ROWS[row]
    if patch is not None:
        patch()
    start = time.monotonic()
    text = calibration if calibration in (None, "self") else data / calibration
    made = quantize(checkpoint, package, recipe, **({} if text is None else {"calibration": text}))
    return {
        "calibration": calibration,
        "quantize_seconds": round(time.monotonic() - start, 1),
        "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "bits_per_weight": made.report["bits_per_weight"],
        "package_mb": round((package / "model.onnx.data").stat().st_size / 1e6, 1),
    }


def measure(package: Path, reference: Path, data: Path) -> dict:
    found = {}
    with LLM(package, accuracy_level=1, verify=False) as llm, LLM(reference, accuracy_level=1, verify=False) as full:
        for text in TEXTS:
            ids = llm.encode((data / text).read_text(), special=False)[:TOKENS]
            found[text] = {"perplexity": round(perplexity(llm, ids, CONTEXT)["perplexity"], 3)}
            if package != reference:
                distance = agreement(llm, full, ids[:COMPARED], CONTEXT)
                found[text] |= {name: round(value, 4) for name, value in distance.items()}
    return found


def transformers_fp32(checkpoint: str, llm_folder: Path, data: Path) -> dict:
    """The independent reference, on the first text."""
    import torch

    with LLM(llm_folder, verify=False) as llm:
        ids = llm.encode((data / TEXTS[0]).read_text(), special=False)[:TOKENS]
    model, nll = load_transformers(open_checkpoint(checkpoint), torch.float32), 0.0
    with torch.no_grad():
        for start in range(0, TOKENS, CONTEXT):
            window = torch.tensor([ids[start : start + CONTEXT]])
            nll += model(window, labels=window).loss.item()
    return {TEXTS[0]: {"perplexity": round(math.exp(nll * CONTEXT / TOKENS), 3)}}


def main() -> None:
    checkpoint, data, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if sys.argv[4:5] == ["--make"]:
        print(json.dumps(make(checkpoint, data, sys.argv[5], Path(sys.argv[6]))))
        return
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "results.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    for row in sys.argv[4:] or [row for row in ROWS if row not in results]:
        package = folder / row.replace(" ", "-").replace(",", "")
        if not package.exists():
            command = [sys.executable, __file__, *sys.argv[1:4], "--make", row, str(package)]
            results[row] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        results[row] = results.get(row, {}) | measure(package, folder / "fp16", data)
        full = results.get("fp16", results[row])
        for text in TEXTS:
            more = results[row][text]["perplexity"] / full[text]["perplexity"] - 1
            results[row][text]["against_fp16_percent"] = round(100 * more, 2)
        kept.write_text(json.dumps(results, indent=1))
        print(row, json.dumps(results[row]), flush=True)
    if REFERENCE not in results:
        results[REFERENCE] = transformers_fp32(checkpoint, folder / "fp16", data)
        kept.write_text(json.dumps(results, indent=1))
    results["protocol"] = f"{TOKENS} tokens, context {CONTEXT}, ONNX Runtime at accuracy level 1"
    provenance.write("quality-smollm2", results, ("numpy", "onnxruntime", "torch"))


if __name__ == "__main__":
    main()
