"""SmolLM2 in INT4 on ONNX Runtime against transformers in fp32, on the same prompt in the same run.

    python tools/measure_cpu.py CHECKPOINT PACKAGE    # the GGUF, and the package made from it

Prefill of 64 tokens and decode of 64 more, alternating, medians of 5; the ratios are what counts, not the rates.
"""

import statistics
import sys
import time
from pathlib import Path

import numpy as np
import provenance
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from llmtrt import LLM, SamplingParams  # noqa: E402
from llmtrt.checkpoints import open_checkpoint  # noqa: E402

PROMPT, NEW, RUNS = 64, 64, 5


def transformers_model(gguf: str) -> torch.nn.Module:
    """The checkpoint in fp32, through our reader: transformers' own GGUF loading needs accelerate."""
    import transformers

    checkpoint = open_checkpoint(gguf)
    config = transformers.AutoConfig.for_model(**checkpoint.config)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = {name: torch.from_numpy(checkpoint.read(name).astype(np.float32)) for name in checkpoint.tensors()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
    model.tie_weights()
    return model


def main() -> None:
    gguf, package = sys.argv[1:]
    torch.set_num_threads(2)
    model = transformers_model(gguf)
    llm = LLM(package, threads=2, reuse_prefixes=False)
    ids = np.random.default_rng(0).integers(100, 40000, PROMPT).tolist()
    ours, theirs = {"prefill": [], "decode": []}, {"prefill": [], "decode": []}
    params = SamplingParams(max_tokens=NEW + 1, temperature=0, ignore_eos=True)
    settings = dict(do_sample=False, pad_token_id=0, eos_token_id=None)
    for run in range(RUNS + 1):
        done = llm.generate(ids, params)
        times = [done.ttft, NEW / done.tokens_per_second]
        with torch.no_grad():
            start = time.perf_counter()
            model.generate(torch.tensor([ids]), max_new_tokens=1, min_new_tokens=1, **settings)
            first = time.perf_counter() - start
            model.generate(torch.tensor([ids]), max_new_tokens=NEW + 1, min_new_tokens=NEW + 1, **settings)
            both = time.perf_counter() - start - first
        if run:  # the first warms up
            for kind, mine, other in zip(("prefill", "decode"), times, (first, both - first)):
                ours[kind].append(mine)
                theirs[kind].append(other)
    results = {"runtime": llm.runtime, "prompt": PROMPT, "new_tokens": NEW, "runs": RUNS}
    for kind, tokens in (("prefill", PROMPT), ("decode", NEW)):
        results[kind] = {
            "ours_tokens_per_s": round(tokens / statistics.median(ours[kind]), 1),
            "transformers_fp32_tokens_per_s": round(tokens / statistics.median(theirs[kind]), 1),
            "ratio_of_each_run": [round(b / a, 2) for a, b in zip(ours[kind], theirs[kind])],
            "median_ratio": round(statistics.median(b / a for a, b in zip(ours[kind], theirs[kind])), 2),
        }
    provenance.write("cpu-smollm2", results, ("numpy", "onnxruntime", "torch", "transformers"))


if __name__ == "__main__":
    main()
