"""GPU memory by kind: what a session will take, and what it took."""

from dataclasses import asdict, dataclass

from llmtrt.engine.manifest import Engine
from llmtrt.errors import UserError
from llmtrt.runtime.streaming import WeightBudget

RESERVE = 256 << 20  # bytes left free for CUDA's own context, kernels and fragmentation


@dataclass(frozen=True)
class Footprint:
    """Bytes. ``weights``: those on the GPU; ``kv_cache``; ``activations``: the block that decode and prefill share, or
    what TensorRT allocates for each; ``scratch``: all else (logits, the sampler's state, room for streamed weights, and,
    where it is measured, TensorRT's own)."""

    weights: int
    kv_cache: int
    activations: int
    scratch: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations + self.scratch

    def to_json(self) -> dict[str, int]:
        return asdict(self) | {"total": self.total}

    def __str__(self) -> str:
        return (
            f"{gb(self.weights)} GB for weights, {gb(self.kv_cache)} GB for the KV cache, {gb(self.activations)} GB for "
            f"activations and {gb(self.scratch)} GB of scratch"
        )

    def require(self, free: int | None, what: str, remedy: str, reserve: int = RESERVE) -> None:
        """UserError with the numbers if that and ``reserve`` bytes are more than ``free`` (None: unknown, no error)."""
        if free is not None and self.total + reserve > free:
            raise UserError(
                f"{what} needs {self}, {gb(self.total)} GB together, but {gb(free)} GB of GPU memory are free: {remedy}"
            )


@dataclass(frozen=True)
class MemoryUse:
    """``predicted`` before anything was allocated; ``measured`` after, by what the GPU had less of at each step, so that
    other programs' use in between counts too."""

    predicted: Footprint
    measured: Footprint

    def to_json(self) -> dict[str, dict[str, int]]:
        return {"predicted": self.predicted.to_json(), "measured": self.measured.to_json()}


def predict(engine: Engine, slots: int, budget: WeightBudget, free: int | None) -> Footprint:
    """What ``slots`` sequences will take, from the manifest alone; ``free`` bytes are what ``budget`` is resolved for
    (None: unknown)."""
    beside, weights = _beside_weights(engine, slots), engine.weight_bytes
    if not engine.streams:
        return Footprint(weights, *beside)
    room = weights if free is None else room_for_weights(engine, slots, free)
    kept = budget.resolve(weights, room, engine.streaming_scratch_bytes)
    kv_cache, activations, scratch = beside
    return Footprint(kept, kv_cache, activations, scratch + (engine.streaming_scratch_bytes if kept < weights else 0))


def room_for_weights(engine: Engine, slots: int, free: int) -> int:
    """Bytes of ``free`` that weights may take beside all else that ``slots`` sequences take."""
    return max(0, free - sum(_beside_weights(engine, slots)) - RESERVE)


def state_bytes(engine: Engine, slots: int) -> int:
    """Logits, the sampler's noise and marks of seen tokens, inputs and what is chosen from their logits, and the KV range;
    logits and marks for the rows of a check, too."""
    vocab_size, capacity = engine.spec.vocab_size, engine.capacity
    logits, marks = 4 * vocab_size, 2 * vocab_size
    of_a_slot = marks + 4 * capacity + 6 * 8 * engine.chunk
    return slots * of_a_slot + logit_rows(engine, slots) * logits + engine.check_rows * marks + 8 * capacity


def most_checked(engine: Engine, slots: int) -> int:
    """Rows of all sequences that one step checks drafts in: of four sequences as many as there are, of more sequences fewer
    each, since their logits are kept for all."""
    return min(slots, 4) * engine.check_rows


def logit_rows(engine: Engine, slots: int) -> int:
    """Rows of logits that are kept for ``slots`` sequences: those of a decode step, and those of a check."""
    return max(slots, most_checked(engine, slots))


def _beside_weights(engine: Engine, slots: int) -> tuple[int, int, int]:
    """KV cache, activations and scratch but for what streaming takes."""
    spec = engine.spec
    return (
        slots * engine.capacity * spec.kv_bytes_per_token(),
        engine.activation_bytes(engine.max_batch if engine.streams else slots) or 0,
        state_bytes(engine, slots),
    )


def gb(size: int) -> str:
    return f"{size / 1e9:.2f}"
