"""Peak memory of `llmtrt quantize` on random checkpoints of one width with 16 and 32 layers (Llama-3.2-1B's shape).

    python tools/measure_memory.py FOLDER    # needs 7 GB of disk there

It should not grow with the number of layers: one tensor is in memory at a time.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import provenance
import random_checkpoint


def main() -> None:
    folder, results = Path(sys.argv[1]), {}
    for layers in (16, 32):
        checkpoint, package = folder / f"checkpoint-{layers}", folder / f"package-{layers}"
        random_checkpoint.write(checkpoint, "1b", layers)
        start = time.monotonic()
        run = subprocess.Popen(
            [sys.executable, "-m", "llmtrt", "quantize", str(checkpoint), "-o", str(package)],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        )
        _, status, usage = os.wait4(run.pid, 0)
        if status:
            sys.exit(f"quantize ended with status {status}")
        results[f"{layers} layers"] = {
            "peak_rss_gb": round(usage.ru_maxrss * 1024 / 1e9, 3),
            "seconds": round(time.monotonic() - start, 1),
            "checkpoint_gb": round((checkpoint / "model.safetensors").stat().st_size / 1e9, 2),
            "package_gb": round((package / "model.onnx.data").stat().st_size / 1e9, 2),
        }
        shutil.rmtree(checkpoint)
        shutil.rmtree(package)
    peaks = [result["peak_rss_gb"] for result in results.values()]
    results["ratio of peaks"] = round(peaks[1] / peaks[0], 3)
    provenance.write("quantize-memory", results, ("numpy", "onnx-ir"))


if __name__ == "__main__":
    main()
