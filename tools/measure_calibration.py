"""Time a layer and peak memory of calibrated quantization, on random checkpoints of one width.

    python tools/measure_calibration.py {8b,1b} FOLDER SEQUENCES LAYERS…

One process for each number of layers, on random tokens, SEQUENCES × 512; on a GPU where torch has one. A stopped run
goes on where it was if it is started again (layers that were done before are not in its median).
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import provenance
import random_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1]))
from llmtrt.checkpoints import open_checkpoint  # noqa: E402
from llmtrt.models import decoder_of  # noqa: E402
from llmtrt.quantization.rtn import choose_block  # noqa: E402

LENGTH, BLOCK = 512, 128


def calibrate_one(checkpoint: Path, sequences: int) -> None:
    import torch

    from llmtrt.quantization.layerwise import calibrate, choose_device

    source = open_checkpoint(checkpoint)
    decoder = decoder_of(source.config, str(checkpoint), None, ())
    ids = np.random.default_rng(0).integers(0, decoder.vocab_size, (sequences, LENGTH))
    work = checkpoint.with_name(checkpoint.name + ".calibration")
    work.mkdir(exist_ok=True)
    marks: list[float] = []

    def report(done: int, total: int, note: str = "") -> None:
        marks.append(time.monotonic())
        print(f"{done}/{total} {marks[-1] - marks[0]:.1f} s", file=sys.stderr, flush=True)

    device = choose_device()
    calibrate(source, decoder, ids, lambda name, k: choose_block(k, BLOCK), "float16", work, device, report)
    seconds = [after - before for before, after in zip(marks, marks[1:])]
    found = {"device": device, "layers_done": len(seconds), "seconds_a_layer": round(statistics.median(seconds), 2)}
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    print(json.dumps(found))


def main() -> None:
    shape, folder, sequences = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if sys.argv[4] == "--one":
        calibrate_one(folder, sequences)
        return
    results: dict = {"tokens": f"{sequences} x {LENGTH}", "block": BLOCK}
    for layers in map(int, sys.argv[4:]):
        checkpoint = folder / f"{shape}-{layers}"
        if not checkpoint.is_dir():
            random_checkpoint.write(checkpoint, shape, layers)
        start = time.monotonic()
        run = subprocess.Popen(
            [sys.executable, __file__, shape, str(checkpoint), str(sequences), "--one"],
            stdout=subprocess.PIPE,
            text=True,
        )
        said = run.stdout.read()
        _, status, usage = os.wait4(run.pid, 0)
        if status:
            sys.exit(f"calibration ended with status {status}")
        results[f"{layers} layers"] = {
            "seconds": round(time.monotonic() - start, 1),
            "peak_rss_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
            **json.loads(said.splitlines()[-1]),
        }
        print(results, flush=True)
    provenance.write(f"calibration-{shape}", results, ("numpy", "torch"))


if __name__ == "__main__":
    main()
