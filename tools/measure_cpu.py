"""Speed of a package of SmolLM2 on ONNX Runtime, two cores: decode and prefill against transformers in fp32, batches, the
second turn of a chat, and prompt lookup on real text.

    python tools/measure_cpu.py CHECKPOINT PACKAGE DATA    # the GGUF, the package made from it, ../shared/data
"""

import sys
from dataclasses import replace
from pathlib import Path

import provenance
import torch
from speculation_tasks import answers, compare

sys.path.insert(0, str(Path(__file__).parents[1]))
from llmtrt import LLM  # noqa: E402
from llmtrt.evaluate.bandwidth import host_bandwidth  # noqa: E402
from llmtrt.evaluate.peer import Transformers  # noqa: E402
from llmtrt.evaluate.speed import Case, Speed, measure, weight_bytes  # noqa: E402

SHORT = Case(prompt=64, tokens=65)
CASES = (SHORT, Case(prompt=512, tokens=65), Case(prompt=64, tokens=65, batch=4), Case(prompt=64, tokens=65, batch=16))
TURN = Case(prompt=50, tokens=9, context=2000)
RUNS = 5


def told(speed: Speed) -> dict:
    said = {
        "ttft_ms": round(1e3 * speed.ttft, 1),
        "prefill_tokens_per_s": round(speed.case.batch * speed.case.prompt / speed.ttft, 1),
        "gap_p50_ms": round(1e3 * speed.gap_p50, 2),
        "gap_p99_ms": round(1e3 * speed.gap_p99, 2),
        "tokens_per_s": round(speed.tokens_per_second, 1),
    }
    if speed.bytes_per_second:
        said["gb_per_s"] = round(speed.bytes_per_second / 1e9, 2)
    return said


def main() -> None:
    checkpoint, package, data = map(Path, sys.argv[1:4])
    torch.set_num_threads(2)
    peer, weights, results = Transformers.read(checkpoint), weight_bytes(package), {}
    with LLM(package, threads=2, max_batch=16) as llm:
        results["runtime"], results["peer"] = llm.runtime, peer.description
        results["copy_gb_per_s"] = round(host_bandwidth(2) / 1e9, 1)
        for case in CASES:
            name = f"prompt {case.prompt}, batch {case.batch}"
            results[name] = {"llmtrt": told(measure(llm, case, RUNS, weights))}
            if case.batch == 1:
                theirs = told(peer.measure(case, RUNS))
                ratios = {
                    f"{what}_ratio": round(results[name]["llmtrt"][of] / theirs[of], 2)
                    for what, of in (("decode", "tokens_per_s"), ("prefill", "prefill_tokens_per_s"))
                }
                results[name] |= {"transformers": theirs} | ratios
            print(name, results[name], flush=True)
        cold = replace(TURN, prompt=TURN.context + TURN.prompt, context=0)
        ttft = {"second turn": measure(llm, TURN, RUNS).ttft, "cold": measure(llm, cold, 2).ttft}
        results[f"{TURN.prompt} tokens behind {TURN.context}"] = {
            f"ttft_ms, {name}": round(1e3 * seconds, 1) for name, seconds in ttft.items()
        }
    options = {"threads": 2, "verify": False}
    with LLM(package, **options) as plain, LLM(package, speculation="prompt-lookup", **options) as fast:
        results["prompt lookup"] = compare(*answers([plain, fast], data), plain, data)
    provenance.write("cpu-smollm2", results, ("numpy", "onnxruntime", "torch", "transformers"))


if __name__ == "__main__":
    main()
