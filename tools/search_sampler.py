"""Times the sampler's plan on this machine's GPU, by what the length of its blocks is a multiple of.

python tools/search_sampler.py FOLDER [MULTIPLE…]     # FOLDER gets compiled kernels; 1 and the sampler's own if none

Writes benchmarks/gpu-sampler.json. Everything that SamplingParams can ask for is in the plan, whatever is asked for.
"""

import sys
from pathlib import Path

import measure_gpu
import numpy as np
import provenance
from trial_plan import Running, build

sys.path.insert(0, str(Path(__file__).parents[1]))
from llmtrt.graph import sampler  # noqa: E402

VOCABULARIES = (128_256, 49_152)  # of the second, blocks of 384 whatever the multiple is
BATCHES, NOISE = (1, 4, 16, 64), 1024
ASKED = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.0, "repetition_penalty": 1.0}


def inputs(batch: int, vocab_size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    column = (batch, 1)
    found = {name: np.full(column, value, np.float32) for name, value in ASKED.items()}
    found |= {name: np.zeros(column, np.int64) for name in ("positions", "last_rows", "steps")}
    found["noise"] = rng.random((batch, NOISE)).astype(np.float32)
    found["logits"] = (3 * rng.normal(size=(batch, 1, vocab_size))).astype(np.float32)
    return found | {"seen": np.zeros((batch, vocab_size), bool)}


def main() -> None:
    folder, multiples = Path(sys.argv[1]), [int(each) for each in sys.argv[2:]] or [1, sampler._ALIGNED]
    folder.mkdir(parents=True, exist_ok=True)
    results: dict = {"machine": measure_gpu.machine()}
    for vocab_size in VOCABULARIES:
        fed = {batch: inputs(batch, vocab_size) for batch in BATCHES}
        least, most = fed[BATCHES[0]], fed[BATCHES[-1]]
        dynamic = {name: (least[name].shape, least[name].shape, most[name].shape) for name in least}
        for multiple in multiples:
            sampler._ALIGNED = multiple
            plan, found = build(sampler.write_sampler(vocab_size), dynamic), {}
            for batch, arrays in fed.items():
                kernels = folder / f"{vocab_size}-{multiple}.kernels"
                running = Running(plan, arrays, kernels, "NONE")
                found[f"batch {batch}"] = round(1e6 * running.seconds(), 1)
                running.save()
                running.close()
            name = f"{vocab_size} tokens, blocks of a multiple of {multiple}: us"
            results[name] = found
            print(name, found, flush=True)
    provenance.write("gpu-sampler", results, ("numpy", "cuda-bindings"), quiet=True)


if __name__ == "__main__":
    main()
