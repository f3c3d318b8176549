"""Engines on this machine's GPU, measured: one stage a call or several, each adds to benchmarks/gpu-*.json.

python tools/measure_gpu.py FOLDER STAGE…     # FOLDER keeps packages and engines between calls

build      the 8B shape with random weights, and the checkpoint $SMOLLM2 ($RECIPE, int4-g64 if unset, $CALIBRATION): whole,
           streaming, stripped for either refit
smollm2    its engine on the text $WIKITEXT: agreement with ONNX Runtime, greedy tokens, variants
variants   the 8B engines against each other, bit by bit; plan sizes and refit times
speed      8B: tokens/s, the loop against bare execute_async_v3, kernels, gaps and host; memory by allocation strategy
streaming  8B: tokens/s against weight budget beside a pinned copy, and with 4 GB of GPU memory free
batches    8B: batches of 1, 4, 16 and 64 prompts, and a queue of 256 in 16 slots, refilled or in turns of 16
turn       8B: the second turn of a chat against a cold one
lookup     SmolLM2: prompt lookup on the texts of the folder $DATA
vocabulary SmolLM2 in INT4 with the vocabulary in fp16 and in INT8: size of package and plan, GPU memory
places     SmolLM2 in INT4 with its weights in the plan and as inputs: tokens/s, TTFT, GPU memory
start      process start to first token, with and without compiled kernels on disk
failures   what a user sees of engines that do not fit
"""

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import provenance
import random_package
from speculation_tasks import compare

sys.path.insert(0, str(Path(__file__).parents[1]))
from llmtrt import LLM, SamplingParams, build, quantize  # noqa: E402
from llmtrt.engine.flavor import choose  # noqa: E402
from llmtrt.engine.gpu import find_gpus  # noqa: E402
from llmtrt.engine.manifest import open_engine  # noqa: E402
from llmtrt.evaluate.perplexity import perplexity  # noqa: E402
from llmtrt.evaluate.speed import Case, measure  # noqa: E402
from llmtrt.package import open_package  # noqa: E402
from llmtrt.quantization.recipe import Recipe, read_recipe  # noqa: E402
from llmtrt.runtime.cuda import Cuda  # noqa: E402
from llmtrt.runtime.load import Loaded  # noqa: E402
from llmtrt.runtime.scheduler import logits_of  # noqa: E402
from llmtrt.runtime.tensorrt import TrtSession  # noqa: E402

ROOT = Path(__file__).parents[1]
TOKENS, PROMPT, NEW = 2048, 512, 128
VARIANTS = {
    "whole": {},
    "streaming": {"weight_streaming": True},
    "stripped identical": {"strip": True},
    "stripped any": {"strip": True, "refit": "any"},
    "weights as inputs": {"weights": "inputs"},
    "all together": {"strip": True, "refit": "any", "weight_streaming": True},
}
GREEDY = {"temperature": 0, "ignore_eos": True}


def engine_folder(folder: Path, name: str) -> Path:
    return folder / f"engine-{name.replace(' ', '-')}"


def say(*words: object) -> None:
    print(f"[{time.monotonic() - START:6.1f}]", *words, flush=True)


START = time.monotonic()


def load(path: Path, reuse_prefixes: bool = False, **options: object) -> tuple[LLM, float]:
    """The engine as an LLM for which the same prompt takes its time again, and the seconds of loading it."""
    start = time.monotonic()
    engine = open_engine(path, verify=False)
    session = TrtSession(engine, verify=False, **options)
    loaded = Loaded(session, path, engine.generation, engine.max_batch, engine.max_seq)
    llm = LLM.from_loaded(loaded, engine.max_batch, reuse_prefixes=reuse_prefixes)
    return llm, time.monotonic() - start


def warm(path: Path) -> None:
    """Loads and closes an engine: what a process loads once would count as the first one's memory."""
    load(path)[0].close()
    gc.collect()


def logits(path: Path, ids: list[int], **options: object) -> tuple[np.ndarray, float]:
    """Teacher-forced logits of ``ids``, and the seconds that loading took."""
    llm, seconds = load(path, **options)
    try:
        return np.concatenate([part.copy() for part in logits_of(llm._session, np.array(ids), 256)]), seconds
    finally:
        llm.close()
        gc.collect()


_BUILD = """
import json, sys
from llmtrt import build
name, package, output, options = json.loads(sys.argv[1])
built = build(package, output, verify=False, **{"max_seq": 2048, "weights": "plan"} | options)
print(json.dumps([name, round(built.seconds, 1), round(built.peak_host_bytes / 1e9, 2)]))
"""


def start_builds(package: Path, folder: Path, options: dict, names: list[str]) -> dict[str, subprocess.Popen]:
    """Builds of the variants ``names`` in ``folder``, each in a process of its own: TensorRT holds Python's lock while it
    compiles."""
    return {
        name: subprocess.Popen(
            [sys.executable, "-c", _BUILD]
            + [json.dumps([name, str(package), str(engine_folder(folder, name)), options | VARIANTS[name]])],
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in names
    }


def end_builds(running: dict[str, subprocess.Popen], package: Path, folder: Path) -> dict:
    found, failed = {}, []
    for name, process in running.items():
        said = process.communicate()[0].splitlines()
        if process.returncode:
            failed.append(name)
            continue
        _, seconds, peak = json.loads(said[-1])
        found[name] = {
            "seconds_with_others_at_once": seconds,
            "peak_host_gb": peak,
            "plan_mb": round((engine_folder(folder, name) / "engine.plan").stat().st_size / 1e6, 1),
        }
    found["package_mb"] = round((package / "model.onnx.data").stat().st_size / 1e6, 1)
    say(found)
    if failed:
        raise RuntimeError(f"not built: {', '.join(failed)}")
    return found


def greedy_tokens(path: Path, ids: list[int], **options: object) -> tuple[list[int], float]:
    """The first tokens, and how many came a second."""
    llm, _ = load(path, **options)
    try:
        llm.generate(ids, SamplingParams(max_tokens=16, **GREEDY))
        done = llm.generate(ids, SamplingParams(max_tokens=16, **GREEDY))
        return done.token_ids, done.tokens_per_second
    finally:
        llm.close()
        gc.collect()


def compare_variants(folder: Path, ids: list[int], names: tuple[str, ...]) -> dict:
    whole, _ = logits(engine_folder(folder, "whole"), ids)
    tokens, rate = greedy_tokens(engine_folder(folder, "whole"), ids)
    found: dict = {"whole": {"tokens_per_s": round(rate, 1)}}
    for name in names:
        path = engine_folder(folder, name)
        streams = "weight_streaming" in VARIANTS[name]
        options = {"weight_budget": "50%"} if streams else {}
        values, seconds = logits(path, ids, **options)
        others, rate = greedy_tokens(path, ids, **options)
        found[name] = {
            "plan_mb": round((path / "engine.plan").stat().st_size / 1e6, 2),
            "load_seconds": round(seconds, 2),
            "weight_budget": "50%" if streams else "all",
            "bit_equal_to_whole": bool(np.array_equal(values, whole)),
            "greedy_tokens_equal": others == tokens,
            "tokens_per_s": round(rate, 1),
            "not_finite": int((~np.isfinite(values)).sum()),
            "largest_difference": float(np.nanmax(np.abs(values - whole))),
        }
        say(name, found[name])
    return found


def build_both(folder: Path) -> dict:
    package = random_package.write(folder / "package", "8b").path
    say("8b package")
    running = start_builds(package, folder, {}, [name for name in VARIANTS if name != "all together"])
    found = {}
    if "SMOLLM2" in os.environ:
        smol, began = folder / "smollm2", time.monotonic()
        recipe, text = os.environ.get("RECIPE", "int4-g64"), os.environ.get("CALIBRATION")
        quantize(os.environ["SMOLLM2"], smol / "package", recipe, **({"calibration": text} if text else {}))
        seconds = round(time.monotonic() - began, 1)
        say("smollm2 package", seconds)
        others = start_builds(smol / "package", smol, {"max_batch": 8}, list(VARIANTS))
        found["smollm2"] = {
            "recipe": recipe,
            "quantize_seconds_beside_builds": seconds,
            **end_builds(others, smol / "package", smol),
        }
    found["8b"] = end_builds(running, package, folder)
    return found


# --- SmolLM2 -------------------------------------------------------------------------------------------------------


def smollm2(folder: Path) -> dict:
    text, folder = Path(os.environ["WIKITEXT"]).read_text(), folder / "smollm2"
    gpu, seconds = load(engine_folder(folder, "whole"))
    cpu = LLM(folder / "package", accuracy_level=1, verify=False)
    manifest = open_package(folder / "package", verify=False).manifest
    results: dict = {key: manifest[key] for key in ("recipe", "calibration") if key in manifest}
    results |= {"load_seconds": round(seconds, 2), "runtimes": [gpu.runtime, cpu.runtime]}
    ids = gpu.encode(text, special=False)[:TOKENS]
    half = TOKENS // 2
    both = [np.concatenate([llm.logits(ids[:half]), llm.logits(ids[half:])]) for llm in (gpu, cpu)]
    top = [each.argmax(1) for each in both]
    differing = np.flatnonzero(top[0] != top[1])
    margins = [float(both[1][row, top[1][row]] - both[1][row, top[0][row]]) for row in differing]
    errors = np.abs(both[0] - both[1])
    results["teacher_forced"] = {
        "tokens": TOKENS,
        "top1_agreement_percent": round(100 * float((top[0] == top[1]).mean()), 2),
        "disagreements": len(differing),
        "largest_margin_of_a_disagreement": round(max(margins, default=0.0), 4),
        # two logits may each be off by a row's largest error: a margin within twice that is explained
        "disagreements_within_twice_the_rows_error": int(
            sum(margin <= 2 * errors[row].max() for margin, row in zip(margins, differing))
        ),
        "error_of_logits_p50_p99_max": [round(float(np.quantile(errors.max(1), q)), 4) for q in (0.5, 0.99, 1)],
        "range_of_logits": round(float(np.ptp(both[1])), 2),
        "perplexity": [round(perplexity(llm, ids)["perplexity"], 4) for llm in (gpu, cpu)],
    }
    say(results["teacher_forced"])
    prompts = [ids[100 * n : 100 * n + 12 + 5 * n] for n in range(8)]
    params = SamplingParams(max_tokens=64, **GREEDY)
    greedy = [[llm.generate(prompt, params).token_ids for prompt in prompts] for llm in (gpu, cpu)]
    together = [done.token_ids for done in gpu.generate(prompts, params)]
    differences = []
    for prompt, ours, wanted in zip(prompts, *greedy):
        place = next((i for i, pair in enumerate(zip(ours, wanted)) if pair[0] != pair[1]), None)
        if place is None:
            differences.append(None)
            continue
        row = cpu.logits([*prompt, *wanted[:place]])[-1]
        differences.append({"token": place, "margin": round(float(row[wanted[place]] - row[ours[place]]), 4)})
    results["greedy"] = {
        "prompts": 8,
        "tokens": 64,
        "equal": sum(each is None for each in differences),
        "first_differences": differences,
        "batch_of_8_equal_to_alone": sum(a == b for a, b in zip(together, greedy[0])),
    }
    say(results["greedy"])
    gpu.generate(ids[:PROMPT], SamplingParams(max_tokens=NEW, **GREEDY))
    done = [gpu.generate(ids[:PROMPT], SamplingParams(max_tokens=NEW, **GREEDY)) for _ in range(5)]
    sampling = SamplingParams(max_tokens=NEW, temperature=0.8, top_k=50, top_p=0.95, seed=1, ignore_eos=True)
    gpu.generate(ids[:PROMPT], sampling)
    sampled = [gpu.generate(ids[:PROMPT], sampling) for _ in range(5)]
    batch = gpu.generate([ids[:PROMPT]] * 8, SamplingParams(max_tokens=NEW, **GREEDY))
    batch = gpu.generate([ids[:PROMPT]] * 8, SamplingParams(max_tokens=NEW, **GREEDY))
    results["generation"] = {
        "prompt": PROMPT,
        "new_tokens": NEW,
        "ttft_ms": round(float(np.median([one.ttft for one in done])) * 1e3, 2),
        "tokens_per_s_greedy": round(float(np.median([one.tokens_per_second for one in done])), 1),
        "tokens_per_s_sampled": round(float(np.median([one.tokens_per_second for one in sampled])), 1),
        "tokens_per_s_batch_8": round(sum(one.tokens_per_second for one in batch), 1),
        "memory": gpu.memory().to_json(),
    }
    say(results["generation"])
    gpu.close()
    cpu.close()
    results["variants"] = compare_variants(folder, ids[:512], tuple(VARIANTS))
    return results


# --- the 8B shape --------------------------------------------------------------------------------------------------


def ids_8b() -> list[int]:
    return np.random.default_rng(0).integers(0, 128000, PROMPT).tolist()


def variants(folder: Path) -> dict:
    return compare_variants(folder, ids_8b(), ("streaming", "stripped identical", "stripped any", "weights as inputs"))


class Peak:
    """The most GPU memory in use while it is entered, in bytes, asked every millisecond."""

    def __enter__(self) -> "Peak":
        self._probe, self._stop = Cuda(), threading.Event()
        self.before = self.least = self._probe.free_bytes()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.least = min(self.least, self._probe.free_bytes())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._probe.close()
        self.bytes = self.before - self.least


def speed(folder: Path) -> dict:
    path, ids, params = engine_folder(folder, "whole"), ids_8b(), SamplingParams(max_tokens=NEW, **GREEDY)
    results: dict = {}
    with Peak() as peak:
        llm, seconds = load(path)
        llm.generate(ids, params)
        done = [llm.generate(ids, params) for _ in range(5)]
    memory = llm.memory()
    results["generation"] = {
        "prompt": PROMPT,
        "new_tokens": NEW,
        "load_seconds": round(seconds, 2),
        "ttft_ms": [round(one.ttft * 1e3, 2) for one in done],
        "tokens_per_s": [round(one.tokens_per_second, 1) for one in done],
    }
    say(results["generation"])
    results["memory"] = memory.to_json() | {
        "peak": peak.bytes,
        "peak_to_predicted": round(peak.bytes / memory.predicted.total, 3),
    }
    say(results["memory"])
    results["loop"] = time_loop(llm, ids)
    say(results["loop"])
    results["profile"] = attempted(profile, llm, ids)
    say(results["profile"])
    llm.close()
    gc.collect()
    results["allocation"] = {}
    for allocation in ("user", "profile", "static"):
        with Peak() as peak:
            llm, _ = load(path, allocation=allocation)
            llm.generate(ids, SamplingParams(max_tokens=8, **GREEDY))
        results["allocation"][allocation] = {"peak": peak.bytes, **llm.memory().measured.to_json()}
        say(allocation, results["allocation"][allocation])
        llm.close()
        gc.collect()
    return results


def time_loop(llm: LLM, ids: list[int]) -> dict:
    """Milliseconds a token: of the whole loop, of execute_async_v3 alone, enqueued anew and captured."""
    session, count = llm._session, 200
    llm.generate(ids, SamplingParams(max_tokens=count, **GREEDY))
    cuda, context = session._cuda, session._decoder(1, session._bucket(PROMPT + count))
    session._state.feed(np.array([[7]]), np.array([[PROMPT + count - 1]]))
    graph = cuda.capture(context.run)
    cuda.launch(graph)

    def bare(run) -> float:
        for _ in range(5):
            run()
        cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            run()
        host = time.perf_counter() - start
        cuda.synchronize()
        return 1e3 * (time.perf_counter() - start) / count, 1e3 * host / count

    rounds: dict[str, list] = {"loop": [], "eager": [], "eager_host": [], "captured": []}
    for _ in range(3):
        done = llm.generate(ids, SamplingParams(max_tokens=count, **GREEDY))
        rounds["loop"].append(1e3 / done.tokens_per_second)
        session._decoder(1, session._bucket(PROMPT + count))
        session._state.feed(np.array([[7]]), np.array([[PROMPT + count - 1]]))
        eager, host = bare(context.run)
        rounds["eager"].append(eager)
        rounds["eager_host"].append(host)
        rounds["captured"].append(bare(lambda: cuda.launch(graph))[0])
    loop, eager, captured = (min(rounds[name]) for name in ("loop", "eager", "captured"))
    return {
        "ms_per_token": {name: [round(value, 4) for value in values] for name, values in rounds.items()},
        "loop_to_bare_execute_async_v3": round(loop / eager, 4),
        "loop_to_bare_captured": round(loop / captured, 4),
    }


def watch(llm: LLM, ids: list, tokens: int) -> list[tuple[float, float, str]]:
    """Start, end (µs) and name of all that ran on the GPU for ``tokens`` tokens, by PyTorch's profiler (CUPTI)."""
    import torch
    from torch.profiler import ProfilerActivity

    torch.cuda.init()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as watched:
        llm.generate(ids, SamplingParams(max_tokens=tokens, **GREEDY))
        torch.cuda.synchronize()
    return sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in watched.events()
        if str(event.device_type).endswith("CUDA")
    )


def longest(kernels: list[tuple[float, float, str]], steps: int, count: int) -> dict[str, list[float]]:
    """The ``count`` kernels that took longest: µs and launches of each, a step."""
    names: dict[str, list[float]] = {}
    for start, end, name in kernels:
        names.setdefault(name[:80], []).append(end - start)
    top = sorted(names.items(), key=lambda item: -sum(item[1]))[:count]
    return {name: [round(sum(took) / steps, 1), round(len(took) / steps, 1)] for name, took in top}


def attempted(look: Callable[..., dict], *arguments: object) -> dict | str:
    """What ``look`` finds with the profiler, or why it does not: it is not the measured thing."""
    try:
        return look(*arguments)
    except Exception as error:  # noqa: BLE001
        return f"no profile: {error}"


def profile(llm: LLM, ids: list) -> dict:
    """Kernel time, gaps and host time of a step, over 32 steps; ``ids`` of one prompt or of several of one length."""
    count = 33
    kernels = watch(llm, ids, count)
    # the last launch of the decoder's first kernel marks a token: take the spans between the tokens' copies to the host
    marks = [end for _, end, name in kernels if "DtoH" in name][-count + 1 :]
    inside = [one for one in kernels if marks[0] < one[0] and one[1] <= marks[-1]]
    steps, span = len(marks) - 1, marks[-1] - marks[0]
    busy, until = 0.0, 0.0  # kernels may run beside each other
    for start, end, _ in inside:
        busy, until = busy + max(0, end - max(start, until)), max(until, end)
    # a product rounds bytes down, or is TensorRT's own
    projections = sum(end - start for start, end, name in inside if "Floo" in name or "equant" in name)
    return {
        "tokens": steps,
        "us_per_token": round(span / steps, 1),
        "kernels_us": round(busy / steps, 1),
        "gaps_us": round((span - busy) / steps, 1),
        "kernels_per_token": round(len(inside) / steps, 1),
        "projections_us": round(projections / steps, 1),
        "longest": longest(inside, steps, 16),
    }


def pinned_copy(size: int = 1 << 30) -> float:
    """GB/s of plain copies from pinned host memory."""
    cuda = Cuda()
    try:
        host, device = cuda.pinned(size, np.uint8), cuda.allocate(size)
        host[:] = 1
        cuda.upload(device, host)
        cuda.synchronize()
        start = time.perf_counter()
        for _ in range(5):
            cuda.upload(device, host)
        cuda.synchronize()
        return 5 * size / (time.perf_counter() - start) / 1e9
    finally:
        cuda.close()


def copied_bytes(llm: LLM, ids: list[int], steps: int) -> int:
    """What is copied to the GPU at each of ``steps``, by PyTorch's profiler (CUPTI): TensorRT streams whole tensors, so that
    it is more than what the budget leaves out."""
    import torch
    from torch.profiler import ProfilerActivity

    torch.cuda.init()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA], acc_events=True) as watched:
        llm.generate(ids, SamplingParams(max_tokens=steps, **GREEDY))
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        watched.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    copies = [
        event["args"]["bytes"] for event in events if event.get("cat") == "gpu_memcpy" and "HtoD" in event["name"]
    ]
    return sum(size for size in copies if size > 1 << 20) // steps  # inputs are smaller, and a layer's weights larger


def streaming(folder: Path) -> dict:
    path, ids = engine_folder(folder, "streaming"), ids_8b()
    wanted, _ = greedy_tokens(engine_folder(folder, "whole"), ids)
    copy = pinned_copy()
    say("pinned copy", copy)
    curve = []
    for percent in (100, 75, 50, 25, 0):
        llm, seconds = load(path, weight_budget=f"{percent}%")
        engine = llm._session._engines["engine.plan"]
        count = 64 if percent == 100 else 12
        llm.generate(ids, SamplingParams(max_tokens=3, **GREEDY))
        tokens = llm.generate(ids, SamplingParams(max_tokens=16, **GREEDY)).token_ids
        done = llm.generate(ids, SamplingParams(max_tokens=count, **GREEDY))
        streamed = copied_bytes(llm, ids, 6)
        rate = streamed * done.tokens_per_second / 1e9
        curve.append(
            {
                "percent": percent,
                "budget": int(engine.weight_streaming_budget_v2),
                "beyond_budget_bytes": int(engine.streamable_weights_size - engine.weight_streaming_budget_v2),
                "streamed_bytes_per_token": streamed,
                "scratch_bytes": int(engine.weight_streaming_scratch_memory_size),
                "load_seconds": round(seconds, 2),
                "ttft_ms": round(done.ttft * 1e3, 1),
                "tokens_per_s": round(done.tokens_per_second, 2),
                "greedy_tokens_equal_to_whole": tokens == wanted,
                "pcie_gb_s": round(rate, 1),
                "share_of_pinned_copy": round(rate / copy, 3),
                "measured": llm.memory().measured.to_json(),
            }
        )
        say(curve[-1])
        del engine
        llm.close()
        gc.collect()
    ballast = Cuda()
    left = 4_000_000_000
    ballast.allocate(ballast.free_bytes() - left)
    free = ballast.free_bytes()
    try:
        llm, seconds = load(path)
        done = llm.generate(ids, SamplingParams(max_tokens=12, **GREEDY))
        small = {
            "free_bytes_before": free,
            "budget": int(llm._session._engines["engine.plan"].weight_streaming_budget_v2),
            "tokens": len(done.token_ids),
            "greedy_tokens_equal_to_whole": done.token_ids == wanted[: len(done.token_ids)],
            "tokens_per_s": round(done.tokens_per_second, 2),
            "memory": llm.memory().to_json(),
        }
        llm.close()
    finally:
        ballast.close()
    say(small)
    return {"pinned_copy_gb_s": round(copy, 2), "curve": curve, "with_4_gb_free": small}


# --- many sequences, chats and drafts -------------------------------------------------------------------------------


def batches(folder: Path) -> dict:
    path, options = engine_folder(folder, "batch-16"), {"max_batch": 64, "opt_batch": 16, "max_seq": 1024}
    if not path.exists():
        if not (folder / "package").exists():
            random_package.write(folder / "package", "8b")
        say("built", round(build(folder / "package", path, verify=False, **options).seconds, 1))
    llm, _ = load(path)
    results: dict = {"built_with": options}
    for size in (1, 4, 16, 64):
        speed = measure(llm, Case(PROMPT, NEW, size), runs=2)
        results[f"batch {size}"] = {
            "ttft_ms": round(1e3 * speed.ttft, 1),
            "gap_p50_ms": round(1e3 * speed.gap_p50, 2),
            "gap_p99_ms": round(1e3 * speed.gap_p99, 2),
            "tokens_per_s": round(speed.tokens_per_second, 1),
        }
        say(size, results[f"batch {size}"])
    results["memory"] = llm.memory().to_json()
    results["profile of 16"] = attempted(profile, llm, [ids_8b()] * 16)
    llm.close()
    rng, slots = np.random.default_rng(1), 16
    prompts = [rng.integers(0, 128000, count).tolist() for count in rng.integers(32, PROMPT, 256)]
    params = [SamplingParams(max_tokens=int(count), **GREEDY) for count in rng.integers(16, NEW, 256)]
    count = sum(each.max_tokens for each in params)
    llm, _ = load(path)
    llm.max_batch = slots
    refilled, turns = [], []
    for _ in range(2):  # the first of each also captures what the others find
        began = time.monotonic()
        llm.generate(prompts, params)
        refilled.append(time.monotonic() - began)
        began = time.monotonic()
        for start in range(0, 256, slots):
            llm.generate(prompts[start : start + slots], params[start : start + slots])
        turns.append(time.monotonic() - began)
    llm.close()
    refilled, turns = min(refilled), min(turns)
    results["queue of 256"] = {
        "slots": slots,
        "new_tokens": count,
        "tokens_per_s_refilled": round(count / refilled, 1),
        "tokens_per_s_in_turns": round(count / turns, 1),
        "ratio": round(turns / refilled, 3),
    }
    say(results["queue of 256"])
    return results


def turn(folder: Path) -> dict:
    llm, _ = load(engine_folder(folder, "whole"), reuse_prefixes=True)
    second = measure(llm, Case(prompt=48, tokens=16, context=1900), runs=5)
    cold = measure(llm, Case(prompt=1948, tokens=16), runs=5)
    llm.close()
    found = {"ttft_ms": {"48 tokens behind 1900": round(1e3 * second.ttft, 2), "1948 cold": round(1e3 * cold.ttft, 2)}}
    say(found)
    return found | {"ratio": round(cold.ttft / second.ttft, 2)}


def lookup(folder: Path) -> dict:
    """Each in processes of its own, in turn, as users have one or the other: what one runs may slow the other's graphs."""
    path, data = engine_folder(folder / "smollm2", "whole"), os.environ["DATA"]
    told: dict[str, dict] = {"plain": {}, "prompt-lookup": {}}
    for kind in 2 * [*told]:
        command = [sys.executable, str(ROOT / "tools" / "speculation_tasks.py"), str(path), data, kind]
        said = json.loads(
            subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
        )
        for task, found in said["answers"].items():
            before = told[kind].setdefault(task, {})
            for name in ("tokens_per_s", "tokens_per_step"):
                found[name] = before.get(name, []) + found[name]
            before |= found
    llm, _ = load(path)
    found = compare(*told.values(), llm, Path(data))
    llm.close()
    say(found)
    return {"tasks": found, "seconds_of_a_step": said["seconds_of_a_step"]}


def make_smollm2(package: Path, engine: Path, recipe: str | Recipe, **options: object) -> None:
    """Those of the two that are not there from an earlier call."""
    if not package.exists():
        quantize(os.environ["SMOLLM2"], package, recipe)
    if not engine.exists():
        build(package, engine, verify=False, **{"weights": "plan"} | options)


def vocabulary(folder: Path) -> dict:
    plain, found = read_recipe("int4-g64"), {}
    for name, recipe in {"fp16": plain, "int8": replace(plain, embedding="int8", lm_head="int8")}.items():
        package, path = folder / f"vocabulary-{name}", engine_folder(folder, f"vocabulary-{name}")
        make_smollm2(package, path, recipe, max_seq=1024)
        if not found:
            warm(path)
        llm, _ = load(path)
        llm.generate(list(range(100, 612)), SamplingParams(max_tokens=8, **GREEDY))
        found[name] = {
            "package_mb": round((package / "model.onnx.data").stat().st_size / 1e6, 1),
            "plan_mb": round((path / "engine.plan").stat().st_size / 1e6, 1),
            "gpu_bytes": llm.memory().to_json()["measured"],
        }
        llm.close()
        say(name, found[name])
    return found


def places(folder: Path) -> dict:
    found: dict = {}
    for weights in ("plan", "inputs"):
        path = engine_folder(folder, f"places-{weights}")
        make_smollm2(folder / "places", path, "int4-g64", max_seq=2048, weights=weights)
        if not found:
            warm(path)
        llm, _ = load(path)
        speed = measure(llm, Case(PROMPT, NEW))
        found[weights] = {
            "tokens_per_s": round(speed.tokens_per_second, 1),
            "ttft_ms": round(1e3 * speed.ttft, 2),
            "gpu_bytes": llm.memory().to_json()["measured"],
        }
        llm.close()
        say(weights, found[weights])
    return found


# --- starting and failing ------------------------------------------------------------------------------------------

_FIRST = """
import json, sys, time
start = time.time()
from llmtrt import LLM, SamplingParams
llm = LLM(sys.argv[1], runtime="tensorrt", verify=False)
loaded = time.time()
done = llm.generate(json.loads(sys.argv[2]), SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
print(json.dumps([loaded - start, done.ttft, time.time() - start]))
llm.close()
"""


def start(folder: Path) -> dict:
    found = {}
    for name, path in (
        ("smollm2", folder / "smollm2" / "engine-whole"),
        ("8b", engine_folder(folder, "whole")),
    ):
        if not path.is_dir():
            continue
        ids = np.random.default_rng(0).integers(0, 40000, PROMPT).tolist()
        cache = folder / f"kernels-{name}"
        shutil.rmtree(cache, ignore_errors=True)
        runs = []
        for turn in ("nothing on disk", "compiled kernels on disk", "compiled kernels on disk, again"):
            began = time.time()
            out = subprocess.run(
                [sys.executable, "-c", _FIRST, str(path), json.dumps(ids)],
                env=os.environ | {"LLMTRT_CACHE": str(cache)},
                capture_output=True,
                text=True,
            )
            if out.returncode:
                runs.append({turn: out.stderr[-300:]})
                continue
            loaded, ttft, _ = json.loads(out.stdout.splitlines()[-1])
            runs.append(
                {
                    "run": turn,
                    "load_seconds": round(loaded, 2),
                    "first_token_after_load_s": round(ttft, 2),
                    "process_seconds": round(time.time() - began, 2),
                }
            )
            say(name, runs[-1])
        found[name] = runs + [{"kernel_files_mb": round(sum(f.stat().st_size for f in cache.iterdir()) / 1e6, 2)}]
    return found


def failures(folder: Path) -> dict:
    """Each case in a process of its own, through the command line: exit code and what it printed."""
    base, found = folder / "smollm2", {}
    work = folder / "failures"
    shutil.rmtree(work, ignore_errors=True)

    def case(name: str, source: str, change, *arguments: str, env: dict | None = None, keep: bool = False) -> None:
        path = work / name.replace(" ", "-")
        shutil.copytree(engine_folder(base, source), path)
        change(path)
        command = [sys.executable, "-m", "llmtrt", "generate", str(path), "-p", "Once", "--max-tokens", "2"]
        out = subprocess.run(
            command + ["--runtime", "tensorrt", *arguments],
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"} | (env or {}),
            capture_output=True,
            text=True,
        )
        found[name] = {"exit_code": out.returncode, "stderr": out.stderr.strip()[-600:], "stdout": out.stdout[-80:]}
        say(name, found[name])
        if not keep:
            shutil.rmtree(path)

    def edit(path: Path, **fields: object) -> None:
        where = path / "manifest.json"
        where.write_text(json.dumps(json.loads(where.read_text()) | fields))

    def cut(path: Path) -> None:
        plan = path / "engine.plan"
        plan.write_bytes(plan.read_bytes()[: plan.stat().st_size // 2])

    def flip(path: Path) -> None:
        plan = path / "engine.plan"
        content = bytearray(plan.read_bytes())
        content[len(content) // 3] ^= 4
        plan.write_bytes(content)

    def flip_head(path: Path) -> None:
        plan = path / "engine.plan"
        content = bytearray(plan.read_bytes())
        content[40] ^= 4
        plan.write_bytes(content)

    def other_package(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["package"] |= {"path": str((base / "package").resolve()), "sha256": "0" * 64}
        (path / "manifest.json").write_text(json.dumps(manifest))

    def nothing(path: Path) -> None:
        pass

    case("as it is", "whole", nothing)
    case("another version", "whole", lambda path: edit(path, flavor={"name": "rtx", "version": "1.5.0.1"}))
    case("another compute capability", "whole", lambda path: edit(path, compute_capabilities=["7.5"]))
    case("truncated", "whole", cut)
    case("truncated and not verified", "whole", cut, "--no-verify")
    case("one bit flipped", "whole", flip)
    case("a bit of the head flipped and not verified", "whole", flip_head, "--no-verify")
    case("package digest differs", "stripped identical", other_package)
    case("no GPU", "whole", nothing, env={"CUDA_VISIBLE_DEVICES": ""})
    ballast = Cuda()
    try:
        ballast.allocate(ballast.free_bytes() - 600_000_000)
        case("out of GPU memory", "whole", nothing)
    finally:
        ballast.close()
    return found


STAGES = {
    "build": build_both,
    "smollm2": smollm2,
    "variants": variants,
    "speed": speed,
    "streaming": streaming,
    "batches": batches,
    "turn": turn,
    "lookup": lookup,
    "vocabulary": vocabulary,
    "places": places,
    "start": start,
    "failures": failures,
}


def machine() -> dict[str, str]:
    found, flavor = find_gpus(), choose(need="run")
    about = {"gpu": found.gpus[0].name, "driver": found.driver, "cuda": found.cuda}
    return about | {"tensorrt": f"{flavor.name} {flavor.version}"}


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    about, failed = machine(), []
    for stage in sys.argv[2:]:
        say("stage", stage)
        began = time.monotonic()
        try:
            results = STAGES[stage](folder)
        except Exception as error:  # noqa: BLE001 - the other stages' GPU time is paid for
            import traceback

            traceback.print_exc()
            failed.append(f"{stage}: {error}")
            continue
        results = {"machine": about, "stage_seconds": round(time.monotonic() - began, 1), **results}
        provenance.write(f"gpu-{stage}", results, ("numpy", "onnxruntime", "onnx-ir", "cuda-bindings"), quiet=True)
    sys.exit("; ".join(failed) or 0)


if __name__ == "__main__":
    main()
