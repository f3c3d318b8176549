"""SmolLM2 in INT4 by llmtrt and by nvidia-modelopt, one after the other in one run: perplexity, wall time, peak memory.

    pip install --target FOLDER nvidia-modelopt ; PYTHONPATH=FOLDER python tools/compare_modelopt.py CHECKPOINT DATA WORK

Both see the same 32 × 512 tokens of WikiText-2 train, quantize every projection but the head in symmetric blocks of 64, and
are judged on the first 16,384 tokens of WikiText-2 test in windows of 1,024: llmtrt's package on ONNX Runtime at accuracy
level 1, modelopt's model as it fake-quantizes it in transformers, fp32. DATA and WORK as in measure_quality.py.
"""

import copy
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import provenance
import torch
from measure_quality import CONTEXT, TEXTS, TOKENS, TRAIN

sys.path.insert(0, str(Path(__file__).parents[1]))
from llmtrt import LLM, quantize  # noqa: E402
from llmtrt.checkpoints import open_checkpoint  # noqa: E402
from llmtrt.evaluate.peer import load_transformers  # noqa: E402
from llmtrt.evaluate.perplexity import perplexity  # noqa: E402
from llmtrt.quantization.recipe import Recipe  # noqa: E402
from llmtrt.runtime.tokenizer import Tokenizer  # noqa: E402

BLOCK, SEQUENCES, LENGTH = 64, 32, 512
METHODS = ("llmtrt gptq", "llmtrt rtn", "modelopt awq_lite", "modelopt max")


def by_llmtrt(algorithm: str, checkpoint: str, data: Path, work: Path) -> dict:
    on = {"calibration": data / TRAIN} if algorithm == "gptq" else {}
    start = time.monotonic()
    made = quantize(checkpoint, work / f"compared-{algorithm}", Recipe(algorithm, BLOCK), **on)
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with LLM(made.package.path, accuracy_level=1) as llm:
        ids = llm.encode((data / TEXTS[0]).read_text(), special=False)
        return {"seconds": seconds, "peak": peak, "perplexity": perplexity(llm, ids, CONTEXT, TOKENS)["perplexity"]}


def by_modelopt(method: str, checkpoint: str, data: Path, work: Path) -> dict:
    import modelopt.torch.quantization as mtq

    tokenizer = Tokenizer(work / "compared-rtn")
    train, test = (tokenizer.encode((data / name).read_text(), special=False) for name in (TRAIN, TEXTS[0]))
    start = time.monotonic()
    model = load_transformers(open_checkpoint(checkpoint), torch.float32)
    config = copy.deepcopy(mtq.INT4_AWQ_CFG if method == "awq_lite" else mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)
    for entry in config["quant_cfg"]:
        if "block_sizes" in entry.get("cfg", {}):
            entry["cfg"]["block_sizes"][-1] = BLOCK

    def calibrate(module: torch.nn.Module) -> None:
        for row in np.array(train[: SEQUENCES * LENGTH]).reshape(SEQUENCES, LENGTH):
            module(torch.from_numpy(row)[None])

    with torch.no_grad():
        mtq.quantize(model, config, calibrate)
        seconds = time.monotonic() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        nll = 0.0
        for at in range(0, TOKENS, CONTEXT):
            window = torch.tensor([test[at : at + CONTEXT]])
            nll += model(window, labels=window).loss.item()
    return {"seconds": seconds, "peak": peak, "perplexity": math.exp(nll * CONTEXT / TOKENS)}


def main() -> None:
    checkpoint, data, work = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if len(sys.argv) > 4:
        tool, method = sys.argv[4].split()
        print(json.dumps((by_llmtrt if tool == "llmtrt" else by_modelopt)(method, checkpoint, data, work)))
        return
    results = {}
    for method in sorted(METHODS, key=lambda name: name != "llmtrt rtn"):  # its package has the tokenizer
        command = [sys.executable, __file__, *sys.argv[1:4], method]
        found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1])
        results[method] = {
            "perplexity": round(found["perplexity"], 3),
            "seconds": round(found["seconds"], 1),
            "peak_rss_gb": round(found["peak"] / 1e6, 2),
        }
        print(method, results[method], flush=True)
    provenance.write("quality-modelopt", results, ("numpy", "onnxruntime", "torch", "transformers", "nvidia-modelopt"))


if __name__ == "__main__":
    main()
