"""Where a build puts the weights if that is left to it: where a GPU like those that it is for was measured to be faster."""

from llmtrt.engine.flavor import Flavor
from llmtrt.engine.gpu import find_gpus
from llmtrt.engine.options import BuildOptions, forbids_inputs
from llmtrt.graph.lowerings.weight_inputs import packable_bytes
from llmtrt.graph.structure import load_graph
from llmtrt.package import Package

# Flavors and compute capabilities: 1.7 and 1.9 × the tokens/s of one sequence (benchmarks/gpu-decode-1b.json,
# gpu-decode-8b.json). Steps of 2 to 64 rows are slower (gpu-projections-4096.json), so it is not for engines of several.
_FASTER_AS_INPUTS = {("rtx", "9.0")}
_SMALLEST = 1 << 28  # bytes of INT4: of 53 MB a token is 3 % faster, for a build of 5 × the time (gpu-places.json)
_MEASURED = "float16"  # in bfloat16 sums of a few products round off three times as much as TensorRT's own


def weight_place(flavor: Flavor, options: BuildOptions, package: Package) -> str:
    """ "inputs" or "plan", as ``BuildOptions.weights``. The GPUs that count are those of ``options``, or else this machine's
    first."""
    gpus = find_gpus().gpus
    here = gpus[0].compute_capability if gpus else None
    targets = {here if name == "current" else name for name in options.compute_capabilities or ("current",)}
    is_faster = all((flavor.name, target) in _FASTER_AS_INPUTS for target in targets)
    if options.max_batch != 1 or forbids_inputs(options) or not is_faster or package.spec.dtype != _MEASURED:
        return "plan"
    return "inputs" if packable_bytes(load_graph(package)) >= _SMALLEST else "plan"
