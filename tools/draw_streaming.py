"""Tokens/s against the weight budget, as `measure_gpu.py FOLDER streaming` measured it, with what PCIe would allow.

python tools/draw_streaming.py [benchmarks/gpu-streaming.json] [OUTPUT.svg]    # needs matplotlib
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402


def main() -> None:
    source = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "benchmarks/gpu-streaming.json")
    output = Path(sys.argv[2]) if len(sys.argv) > 2 else source.with_suffix(".svg")
    results = json.loads(source.read_text())["results"]
    curve, copy = results["curve"], results["pinned_copy_gb_s"]
    streamed = [point for point in curve if point["streamed_bytes_per_token"]]
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    percent, rate = zip(*((point["percent"], point["tokens_per_s"]) for point in curve))
    axes.plot(percent, rate, "o-", label="measured")
    line = [(point["percent"], copy * 1e9 / point["streamed_bytes_per_token"]) for point in streamed]
    axes.plot(*zip(*line), "--", label=f"PCIe: a plain pinned copy, {copy:.1f} GB/s")
    for point in streamed:
        label = f"{point['pcie_gb_s']:.1f} GB/s"
        axes.annotate(label, (point["percent"], point["tokens_per_s"]), textcoords="offset points", xytext=(4, -12))
    axes.set(yscale="log", xlabel="weights on the GPU, % of those that can be streamed", ylabel="tokens/s, batch 1")
    axes.set_title(f"Weight streaming, 8B shape in INT4, {results['machine']['gpu']}")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(output, bbox_inches="tight")


if __name__ == "__main__":
    main()
