"""What a build was asked for, checked against the flavor before anything long starts."""

from dataclasses import dataclass, replace
from pathlib import Path

from llmtrt.engine.flavor import Flavor
from llmtrt.engine.gpu import find_gpus
from llmtrt.errors import UserError

REFITS = ("identical", "any")
WEIGHTS = ("plan", "inputs", "both")  # and "auto", which ``weight_place`` settles
CHECK_ROWS = 16
CONTEXT_STEP = 256  # rows of the cache that a step sees are a multiple of it, and so is the capacity
# LAZY swaps kernels while a person waits, and with them the last bits of every number; EAGER compiles for every new
# shape. NONE is the same kernels always.
KERNEL_SPECIALIZATION = "NONE"
# Of trt.BuilderFlag, by capability. Not REFIT: it makes the parser's own constants refittable too, which no initializer
# names, so that the refitter calls itself incomplete ("42 weights out of 47"), and folds none of them, so that the last
# bits differ.
FLAGS = {
    "weight_streaming": "WEIGHT_STREAMING",
    "strip": "STRIP_PLAN",
    "refit_identical": "REFIT_IDENTICAL",
    "refit": "REFIT_INDIVIDUAL",
    "version_compatible": "VERSION_COMPATIBLE",
}
_TYPICAL_CONTEXT = 1024
_FEWEST_STEADY, _HALVED_TO = 256, 512


@dataclass(frozen=True)
class BuildOptions:
    """The options of ``llmtrt.build``, of the same names; ``resolved`` fills in what depends on package and flavor."""

    max_batch: int = 1
    max_seq: int | None = None
    chunk: int = 512
    opt_batch: int = 1
    opt_context: int | None = None
    compute_capabilities: tuple[str, ...] = ()
    weight_streaming: bool = False
    strip: bool = False
    refit: str | None = None
    version_compatible: bool = False
    kernel_specialization: str = KERNEL_SPECIALIZATION
    workspace: int | None = None
    tactic_shared_memory: int | None = None
    timing_cache: Path | None = None
    debug_tensors: tuple[str, ...] = ()
    weights: str = "plan"
    flags: tuple[str, ...] = ()  # of trt.BuilderFlag, from resolved()

    @property
    def check_rows(self) -> int:
        """The most rows of a step that checks a draft."""
        return min(CHECK_ROWS, self.chunk)

    @property
    def steady_rows(self) -> tuple[int, ...]:
        """The sizes of prefill steps that may have kernels of their own: a chunk and its halves, down to 512 rows."""
        sizes = [self.chunk] if self.chunk >= _FEWEST_STEADY else []
        while sizes and sizes[-1] % 2 == 0 and sizes[-1] // 2 >= _HALVED_TO:
            sizes.append(sizes[-1] // 2)
        return tuple(sizes)

    @property
    def refits(self) -> list[str]:
        """The flags with which a plan's weights can be changed, so that each has to stay the package's own."""
        return [flag for flag in self.flags if flag.startswith("REFIT")]

    @property
    def capacity(self) -> int:
        """Rows of the KV cache of one sequence: ``max_seq``, and a chunk whose padding is written past it, rounded up."""
        return -(-(self.max_seq + self.chunk) // CONTEXT_STEP) * CONTEXT_STEP

    def resolved(self, flavor: Flavor, max_seq: int) -> "BuildOptions":
        """The same with sizes, targets and flags settled for ``flavor`` and a package of ``max_seq`` tokens.

        Raises UserError for a size out of range, a flag that the flavor does not have, and one that needs a GPU where
        there is none.
        """
        max_seq = _size("max_seq", max_seq if self.max_seq is None else self.max_seq, max_seq)
        max_batch = _size("max_batch", self.max_batch, 1 << 16)
        chunk = min(max_seq, _size("chunk", self.chunk, 1 << 20))
        context = min(_TYPICAL_CONTEXT, max_seq) if self.opt_context is None else self.opt_context
        for name in ("workspace", "tactic_shared_memory"):
            if getattr(self, name) is not None:
                _size(name, getattr(self, name), 1 << 50)
        _check_specialization(flavor, self.kernel_specialization)
        _check_weights(self)
        return replace(
            self,
            max_batch=max_batch,
            max_seq=max_seq,
            chunk=chunk,
            opt_batch=_size("opt_batch", self.opt_batch, max_batch),
            opt_context=_size("opt_context", context, max_seq),
            compute_capabilities=_targets(flavor, self.compute_capabilities),
            flags=_flags(flavor, self),
        )


def _size(name: str, value: object, limit: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= limit:
        raise UserError(f"--{name.replace('_', '-')} should be an integer from 1 to {limit}, but is {value!r}")
    return value


def _check_specialization(flavor: Flavor, name: str) -> None:
    if flavor.can("kernel_specialization"):
        kinds = flavor.module.DynamicShapesKernelSpecializationStrategy.__members__
        if name not in kinds:
            raise UserError(f"--kernel-specialization should be {', '.join(kinds)}, but is {name!r}")
    elif name != KERNEL_SPECIALIZATION:
        raise UserError(f"TensorRT {flavor.name} {flavor.version} has no kernel specialization: leave it out")


def forbids_inputs(options: BuildOptions) -> list[str]:
    """The flags of ``options`` with which weights cannot be inputs."""
    others = {"--strip": options.strip, "--refit": options.refit, "--weight-streaming": options.weight_streaming}
    others |= {"--debug-tensors": options.debug_tensors}
    return [flag for flag, on in others.items() if on]


def _check_weights(options: BuildOptions) -> None:
    if options.weights not in WEIGHTS:
        raise UserError(f"--weights should be auto, {', '.join(WEIGHTS)}, but is {options.weights!r}")
    if options.weights != "plan" and (given := forbids_inputs(options)):
        raise UserError(f"--weights {options.weights} does not go with {', '.join(given)}: leave one of them out")


def _flags(flavor: Flavor, options: BuildOptions) -> tuple[str, ...]:
    if options.refit not in (None, *REFITS):
        raise UserError(f"--refit should be {' or '.join(REFITS)}, but is {options.refit!r}")
    refit = options.refit or ("identical" if options.strip else None)
    wanted = {
        "weight_streaming": options.weight_streaming,
        "strip": options.strip,
        "refit_identical": refit == "identical",
        "refit": refit == "any",
        "version_compatible": options.version_compatible,
    }
    chosen = [capability for capability, on in wanted.items() if on]
    for capability in chosen:
        if not flavor.can(capability):
            said = capability.removesuffix("_identical").replace("_", "-")
            raise UserError(f"TensorRT {flavor.name} {flavor.version} cannot do --{said}: leave it out")
    if (options.strip or refit) and (problem := find_gpus().problem):
        raise UserError(
            f"{'--strip' if options.strip else '--refit'} needs an NVIDIA GPU where the engine is built, but {problem}: "
            "build there, or without it"
        )
    return tuple(sorted(FLAGS[capability] for capability in chosen))


def _targets(flavor: Flavor, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """The compute capabilities as "8.9", in the flavor's order; "current" becomes this machine's GPU's."""
    if not wanted:
        return ()
    if not flavor.targets:
        raise UserError(f"TensorRT {flavor.name} builds for this machine's GPU alone: leave --compute-capability out")
    names = set(wanted)
    if "current" in names:
        found = find_gpus()
        if found.problem:
            raise UserError(f"--compute-capability current needs an NVIDIA GPU, but {found.problem}: name one, as 8.9")
        names = names - {"current"} | {found.gpus[0].compute_capability}
    if unknown := sorted(names - set(flavor.targets)):
        raise UserError(
            f"TensorRT {flavor.name} {flavor.version} does not build for compute capability {', '.join(unknown)}: take "
            f"{', '.join(flavor.targets)}"
        )
    return tuple(target for target in flavor.targets if target in names)
