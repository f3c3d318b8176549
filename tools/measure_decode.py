"""Batch 1 on this machine's GPU, beside transformers in the same run: each stage writes benchmarks/gpu-decode-SHAPE-….json.

python tools/measure_decode.py FOLDER {8b,1b} STAGE…     # FOLDER keeps packages and engines between calls

With ONLY="plan;inputs, short" in the environment, of the engines named there alone.

build     random INT4 weights, the head's too: engines with them in the plan or as inputs, for short and long contexts
speed     prompt 512, 128 new tokens: tokens/s, greedy and sampled, TTFT of 512 and 2,048 tokens, a token's time split by
          kernels; memory
context   steps behind 512 and behind 8,192 tokens, in caches of 1,024 to 34,816 rows; prefill of 2,048 and 8,192 tokens;
          in a call of its own: the profiler of speed may slow the steps that follow it
growth    a sequence that grows from 512 to 2,048 tokens: the longest gaps between two, where a shape is new, with compiled
          kernels on disk and without
peer      transformers, fp16, static cache, compiled: the same prompt and tokens
"""

import gc
import os
import shutil
import sys
import time
from pathlib import Path

import measure_gpu
import numpy as np
import provenance
import random_package
from measure_gpu import (
    GREEDY,
    NEW,
    PROMPT,
    Peak,
    attempted,
    end_builds,
    engine_folder,
    load,
    longest,
    profile,
    say,
    start_builds,
    warm,
    watch,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from llmtrt import LLM, SamplingParams  # noqa: E402
from llmtrt.evaluate.speed import Case, measure  # noqa: E402

ENGINES = {
    "plan": {"max_seq": 8192 + 1024, "chunk": 2048},
    "inputs": {"max_seq": 8192 + 1024, "chunk": 2048, "weights": "inputs"},
    "inputs, short": {"max_seq": 768, "chunk": 256, "weights": "inputs"},
    "inputs, long": {"max_seq": 32768, "chunk": 2048, "weights": "inputs"},
}
PLAIN = Case(PROMPT, NEW)
ONLY = os.environ["ONLY"].split(";") if "ONLY" in os.environ else [*ENGINES]


def build(folder: Path, shape: str, results: dict) -> None:
    package = random_package.write(folder / "package", shape, int4_head=True).path
    say("package")
    measure_gpu.VARIANTS |= ENGINES
    results |= end_builds(start_builds(package, folder, {}, ONLY), package, folder)


def rates(llm: LLM, case: Case, runs: int = 3) -> dict:
    speed = measure(llm, case, runs=runs)
    return {
        "ttft_ms": round(1e3 * speed.ttft, 2),
        "gap_p50_ms": round(1e3 * speed.gap_p50, 4),
        "gap_p99_ms": round(1e3 * speed.gap_p99, 4),
        "tokens_per_s": round(speed.tokens_per_second, 1),
    }


def ids_of(llm: LLM, count: int) -> list[int]:
    return np.random.default_rng(0).integers(0, llm._session.spec.vocab_size, count).tolist()


def prefill(llm: LLM, ids: list[int]) -> dict:
    """The kernels of one prefill of ``ids``."""
    kernels = watch(llm, ids, 1)
    return {"us": round(sum(end - start for start, end, _ in kernels), 1), **longest(kernels, 1, 16)}


def speed(folder: Path, shape: str, results: dict) -> None:
    warm(engine_folder(folder, ONLY[0]))
    eager = {"kernel_specialization": "EAGER"}
    cases = {"plan": {}, "inputs": {}, "inputs, short": {}, "inputs, EAGER": eager}
    for name, settings in cases.items():
        engine = name.removesuffix(", EAGER")
        if engine not in ONLY:
            continue
        with Peak() as peak:
            llm, seconds = load(engine_folder(folder, engine), **settings)
            found = {"load_seconds": round(seconds, 2), **rates(llm, PLAIN)}
        if llm.max_seq > 2048:
            found["ttft_2048_ms"] = rates(llm, Case(2048, 2))["ttft_ms"]
        found["memory"] = llm.memory().to_json() | {"peak": peak.bytes}
        ids = ids_of(llm, PROMPT)
        sampled = SamplingParams(max_tokens=NEW, temperature=0.8, top_p=0.95, seed=1, ignore_eos=True)
        found["sampled_tokens_per_s"] = round(max(llm.generate(ids, sampled).tokens_per_second for _ in range(3)), 1)
        found["greedy"] = llm.generate(ids, SamplingParams(max_tokens=16, **GREEDY)).token_ids
        found["profile"], found["prefill"] = attempted(profile, llm, ids), attempted(prefill, llm, ids)
        say(name, found)
        results[name] = found
        llm.close()
        gc.collect()


def context(folder: Path, shape: str, results: dict) -> None:
    short, behind = PLAIN, Case(64, NEW, context=8192 - 64 - NEW)
    cases = {
        "inputs, short": [short],
        "inputs": [short, behind, Case(2048, 2), Case(8192, 2)],
        "inputs, long": [short, behind],
        "plan": [short, behind, Case(2048, 2), Case(8192, 2)],
    }
    for name, asked in cases.items():
        if name not in ONLY:
            continue
        llm, _ = load(engine_folder(folder, name), reuse_prefixes=True)
        for case in asked:
            where = f"{name}: {case.context} + {case.prompt} + {case.tokens} tokens"
            results[where] = rates(llm, case, runs=2)
            say(where, results[where])
        if behind in asked:
            results[f"{name}: profile behind 8192 tokens"] = attempted(profile, llm, ids_of(llm, 8192))
        llm.close()
        gc.collect()


def peer(folder: Path, shape: str, results: dict) -> None:
    import torch
    import transformers
    from random_checkpoint import config_of

    from llmtrt.evaluate.peer import Transformers

    config = transformers.AutoConfig.for_model(**config_of(shape))
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()
    say("model")
    theirs = Transformers(model)
    results["system"] = theirs.description
    for case in (PLAIN, Case(2048, 2)):
        found = theirs.measure(case, runs=2)
        results[f"{case.prompt} + {case.tokens} tokens"] = told = {"ttft_ms": round(1e3 * found.ttft, 2)}
        if case == PLAIN:
            told["tokens_per_s"] = round(found.tokens_per_second, 1)
        say(results)
    results["gpu_bytes"] = theirs.gpu_bytes()


def growth(folder: Path, shape: str, results: dict) -> None:
    path = engine_folder(folder, ONLY[0])
    params = SamplingParams(max_tokens=2048 - PROMPT, **GREEDY)
    for kind in ("NONE", "EAGER"):
        cache = folder / f"kernels-{kind}"
        shutil.rmtree(cache, ignore_errors=True)
        os.environ["LLMTRT_CACHE"] = str(cache)
        for turn in ("nothing on disk", "compiled kernels on disk"):
            llm, seconds = load(path, kernel_specialization=kind)
            called, ids = time.perf_counter(), ids_of(llm, PROMPT)
            times = np.array([time.perf_counter() - called for _ in llm.generate_stream(ids, params)])
            gaps = 1e3 * np.diff(times)
            places = sorted(np.argsort(gaps)[-12:].tolist())
            results[f"{kind}, {turn}"] = {
                "load_seconds": round(seconds, 2),
                "ttft_ms": round(1e3 * float(times[0]), 1),
                "gap_p50_ms": round(float(np.median(gaps)), 4),
                "longest_gaps_ms": {PROMPT + 1 + place: round(float(gaps[place]), 1) for place in places},
                "kernel_files_mb": round(sum(file.stat().st_size for file in cache.iterdir()) / 1e6, 2),
            }
            say(kind, turn, results[f"{kind}, {turn}"])
            llm.close()
            gc.collect()


STAGES = {"build": build, "speed": speed, "context": context, "growth": growth, "peer": peer}


def main() -> None:
    folder, shape = Path(sys.argv[1]) / sys.argv[2], sys.argv[2]
    folder.mkdir(parents=True, exist_ok=True)
    results: dict = {"machine": measure_gpu.machine()}
    failed = []
    for stage in sys.argv[3:]:
        say("stage", stage)
        began = time.monotonic()
        try:
            STAGES[stage](folder, shape, results.setdefault(stage, {}))
            results[stage]["stage_seconds"] = round(time.monotonic() - began, 1)
        except Exception as error:  # noqa: BLE001 - the other stages' GPU time is paid for
            import traceback

            traceback.print_exc()
            failed.append(f"{stage}: {error}")
    name = f"gpu-decode-{shape}-{'-'.join(sys.argv[3:])}"
    provenance.write(name, results, ("numpy", "torch", "transformers", "cuda-bindings"), quiet=True)
    sys.exit("; ".join(failed) or 0)


if __name__ == "__main__":
    main()
