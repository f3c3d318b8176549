"""The engine: the folder that `llmtrt build` writes, bound to one TensorRT flavor and version.

engine.plan  greedy.plan  sampler.plan  tokenizer.json  tokenizer_config.json  chat_template.jinja  manifest.json
and of plans that take weights as inputs: decode.plan  weights.bin
"""

from dataclasses import dataclass
from pathlib import Path

from llmtrt import files
from llmtrt.errors import UserError
from llmtrt.manifest import MANIFEST, Kind, read_manifest
from llmtrt.package import WEIGHTS as PACKAGE_WEIGHTS
from llmtrt.package import ModelSpec

ENGINE = Kind("llmtrt-engine", 8, "an engine", "llmtrt build PACKAGE -o ENGINE")
PLAN, DECODE = "engine.plan", "decode.plan"  # of every step; of one row of one sequence alone, where there is one
WEIGHTS, WEIGHT_ALIGNMENT = "weights.bin", 4096  # what the plans take as inputs; of each one's start
GREEDY, SAMPLER = "greedy.plan", "sampler.plan"  # logits to the likeliest token; to a token as SamplingParams say
DECODE_STEPS, PREFILL_STEPS = "decode", "prefill"  # profiles of PLAN for all sizes of such steps
REFIT_GRAPH = "graph.onnx"  # of a plan that can be refitted: what it was built from, without weights
_SIZES = ("max_batch", "max_seq", "chunk", "capacity", "check_rows")


def sampler_rows(check_rows: int, max_batch: int) -> dict[str, int]:
    """The most rows of logits that the plan of each sampler takes."""
    return {GREEDY: check_rows * max_batch, SAMPLER: max(check_rows, max_batch)}


@dataclass(frozen=True)
class Engine:
    """An opened engine. ``package_path`` is None where the package it came from is not found or is another by now."""

    path: Path
    spec: ModelSpec
    generation: dict
    manifest: dict
    package_path: Path | None

    @property
    def plan(self) -> Path:
        return self.path / PLAN

    @property
    def flavor(self) -> str:
        return self.manifest["flavor"]["name"]

    @property
    def flavor_version(self) -> str:
        return self.manifest["flavor"]["version"]

    @property
    def compute_capabilities(self) -> tuple[str, ...]:
        """The targets that it was built for ("8.6"); empty: every GPU that the flavor supports by default."""
        return tuple(self.manifest["compute_capabilities"])

    @property
    def version_compatible(self) -> bool:
        """Whether later versions and the lean runtime run it; such a plan carries code that runs on the host."""
        return "VERSION_COMPATIBLE" in self.manifest["flags"]

    @property
    def stripped(self) -> bool:
        return "STRIP_PLAN" in self.manifest["flags"]

    @property
    def refittable(self) -> bool:
        return any(flag.startswith("REFIT") for flag in self.manifest["flags"])

    @property
    def streams(self) -> bool:
        """Whether weights may stay in host memory."""
        return "WEIGHT_STREAMING" in self.manifest["flags"]

    @property
    def debug_tensors(self) -> list[str]:
        """Outputs beside those of the graph contract."""
        return self.manifest["debug_tensors"]

    @property
    def plans(self) -> tuple[str, ...]:
        """The files that TensorRT loads."""
        return (PLAN, *([DECODE] if self.manifest["one_row"] else []), GREEDY, SAMPLER)

    @property
    def weight_inputs(self) -> dict[str, tuple[int, int]]:
        """Of each weight that a plan takes as an input, where it begins in the file WEIGHTS and its bytes."""
        return {name: (start, length) for name, (start, length) in self.manifest["weight_inputs"].items()}

    @property
    def weight_bytes(self) -> int:
        """GPU memory for all weights: what the builder said, or else the size of the files that hold them."""
        said = self.manifest["memory"].get("weights")
        if said is None or self.stripped:
            said = sum((self.path / name).stat().st_size for name in self.plans if name not in (GREEDY, SAMPLER))
        if self.stripped and self.package_path is not None:
            said += (self.package_path / PACKAGE_WEIGHTS).stat().st_size
        return said + self._input_bytes

    @property
    def _input_bytes(self) -> int:
        return sum(length for _, length in self.weight_inputs.values())

    @property
    def _takes_inputs(self) -> bool:
        """Whether PLAN does, and not DECODE alone."""
        return "weight_inputs" in self.manifest["lowerings"]

    def step_weight_bytes(self, slots: int) -> int:
        """Weights that a decode step of ``slots`` sequences reads: those of the plan that it runs."""
        if self._takes_inputs or slots == 1 and self.manifest["one_row"]:
            return self._input_bytes
        return self.weight_bytes - self._input_bytes

    @property
    def streaming_scratch_bytes(self) -> int:
        """What TensorRT allocates beside the budget as soon as one weight is streamed: room for the largest, twice."""
        return 2 * self.manifest["memory"]["largest_weight"]

    def activation_bytes(self, slots: int) -> int | None:
        """About what ``slots`` sequences take of memory for activations, from what the builder said of ``max_batch``;
        None where it said nothing."""
        said = self.manifest["memory"].get("activations")
        if said is None:
            return None
        most = self._unpacking(max(said)) if self._takes_inputs else max(said) * slots // self.max_batch
        return max([most, *((self.manifest["one_row"] or {}).get("activations") or [])])

    def _unpacking(self, said: int) -> int:
        """Activations of a plan that unpacks its weights, for one sequence as for all: TensorRT counts every matrix, but has
        those of one layer at a time, or an INT8 head. Of 32 layers of the 8B shape it ``said`` 13.9 GB and took 0.48."""
        largest = max(length for name, (_, length) in self.weight_inputs.items() if name.endswith(".bytes"))
        unpacked = largest * (4 if self.spec.dtype == "float32" else 2)
        return min(said, max(said // self.spec.layers, unpacked) * 5 // 4)

    @property
    def profiles(self) -> list[dict]:
        """The optimization profiles of PLAN: name, and for each input [min, opt, max] shapes."""
        return self.manifest["profiles"]

    @property
    def max_batch(self) -> int:
        return self.manifest["max_batch"]

    @property
    def max_seq(self) -> int:
        """The most tokens of one sequence."""
        return self.manifest["max_seq"]

    @property
    def chunk(self) -> int:
        """The most rows of one step."""
        return self.manifest["chunk"]

    @property
    def check_rows(self) -> int:
        """The most rows of a sequence whose likeliest tokens the plan GREEDY gives in one step, and the most rows, of one
        sequence or several, whose tokens the plan SAMPLER chooses."""
        return self.manifest["check_rows"]

    @property
    def capacity(self) -> int:
        """The rows of the KV cache of one sequence."""
        return self.manifest["capacity"]


def open_engine(path: str | Path, verify: bool = True) -> Engine:
    """Reads the manifest of the engine in ``path`` and, with ``verify``, checks every file's SHA-256.

    Raises UserError naming the file that is missing, corrupt or of another format version.
    """
    path = Path(path)
    manifest, where = read_manifest(path, ENGINE), path / MANIFEST
    _check(manifest, where)
    spec = ModelSpec.from_json(manifest.get("model"), where)
    if verify:
        files.verify_files(path, manifest["files"])
    return Engine(path, spec, manifest["generation"], manifest, _find_package(path, manifest["package"]))


def _check(manifest: dict, where: Path) -> None:
    kinds = {
        "files": dict,
        "generation": dict,
        "package": dict,
        "flavor": dict,
        "profiles": list,
        "compute_capabilities": list,
        "lowerings": list,
        "flags": list,
        "debug_tensors": list,
        "memory": dict,
        "weight_inputs": dict,
        "runtime": dict,
    }
    for name, kind in kinds.items():
        if not isinstance(manifest.get(name), kind):
            raise UserError(
                f"{where}: {name!r} should be a JSON {'object' if kind is dict else 'array'}: "
                "make the engine anew with `llmtrt build`"
            )
    for name in _SIZES:
        value = manifest.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            raise UserError(f"{where}: {name} should be a positive integer, but is {value!r}")
    if not all(map(_is_profile, manifest["profiles"])):
        raise UserError(
            f"{where}: 'profiles' should hold names and shapes of input_ids: make the engine anew with `llmtrt build`"
        )
    if manifest["capacity"] < manifest["max_seq"] + manifest["chunk"]:
        raise UserError(
            f"{where}: capacity {manifest['capacity']} is less than max_seq {manifest['max_seq']} + chunk "
            f"{manifest['chunk']}: make the engine anew with `llmtrt build`"
        )
    if not isinstance(manifest.get("one_row", ""), dict | None):
        raise UserError(f"{where}: 'one_row' should be a JSON object or null: make the engine anew with `llmtrt build`")
    needed = {PREFILL_STEPS} | (set() if manifest["one_row"] and manifest["max_batch"] == 1 else {DECODE_STEPS})
    if missing := sorted(needed - {profile["name"] for profile in manifest["profiles"]}):
        raise UserError(
            f"{where}: 'profiles' should hold one named {missing[0]!r}: make the engine anew with `llmtrt build`"
        )
    expected = [PLAN, GREEDY, SAMPLER, *([DECODE] if manifest["one_row"] else [])]
    expected += [WEIGHTS] if manifest["weight_inputs"] else []
    if missing := [name for name in expected if name not in manifest["files"]]:
        raise UserError(f"{where}: 'files' should list {missing[0]}: make the engine anew with `llmtrt build`")
    texts = [manifest["flavor"].get("name"), manifest["flavor"].get("version"), *manifest["compute_capabilities"]]
    texts += [*manifest["flags"], *manifest["debug_tensors"], manifest["runtime"].get("kernel_specialization", "")]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(
            f"{where}: flavor, compute_capabilities, flags, debug_tensors and runtime should hold names: make the "
            "engine anew"
        )
    if any(flag.startswith("REFIT") for flag in manifest["flags"]) and REFIT_GRAPH not in manifest["files"]:
        raise UserError(f"{where}: 'files' should list {REFIT_GRAPH}: make the engine anew with `llmtrt build`")
    size = manifest["files"].get(WEIGHTS, {}).get("bytes", 0)
    for name, extent in manifest["weight_inputs"].items():
        if not isinstance(extent, list) or len(extent) != 2 or not all(_is_size(each) for each in extent):
            raise UserError(
                f"{where}: weight_inputs should hold where {name} begins and its bytes, but holds {extent!r}"
            )
        if extent[0] % WEIGHT_ALIGNMENT or not extent[1] or sum(extent) > size:
            raise UserError(
                f"{where}: {name} should lie in the {size} bytes of {WEIGHTS}, but has {extent[1]} from {extent[0]} on: "
                "make the engine anew with `llmtrt build`"
            )
    memory = manifest["memory"]
    activations = memory.get("activations")
    alone = (manifest["one_row"] or {}).get("activations")
    sizes = [memory.get("largest_weight"), *(activations if isinstance(activations, list) else [])]
    sizes += alone if isinstance(alone, list) else [] if alone is None else [alone]
    sizes += [] if memory.get("weights") is None else [memory["weights"]]
    if not all(map(_is_size, sizes)) or activations == []:
        raise UserError(f"{where}: 'memory' should hold sizes in bytes: make the engine anew with `llmtrt build`")


def _is_profile(value: object) -> bool:
    """Whether it has a name and three shapes of input_ids."""
    shapes = value.get("shapes") if isinstance(value, dict) and isinstance(value.get("name"), str) else None
    shapes = shapes.get("input_ids") if isinstance(shapes, dict) else None
    return (
        isinstance(shapes, list)
        and len(shapes) == 3
        and all(isinstance(shape, list) and len(shape) == 2 and all(map(_is_size, shape)) for shape in shapes)
    )


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 50


def _find_package(path: Path, package: dict) -> Path | None:
    """The package's folder, if its manifest is the very one that the engine was built from."""
    where = package.get("path")
    if not isinstance(where, str) or "\0" in where:
        return None
    found = (path.resolve() / where).resolve()
    try:
        same = files.digest_file(found / MANIFEST)["sha256"] == package.get("sha256")
    except OSError:
        return None
    return found if same else None
