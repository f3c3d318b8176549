"""Which of an engine's optimization profiles a step takes."""

from llmtrt.engine.manifest import DECODE, DECODE_STEPS, PLAN, PREFILL_STEPS, Engine

# Of the rows of a size that has kernels of its own: from here on a step is padded to it. A row's products cost 0.70 µs a
# layer there and 0.96 where the size is free, at the 8B shape on an H100 (benchmarks/gpu-prefill.json).
_WORTH_PADDING = 0.75


class Profiles:
    """By the sizes of a step; the plan for steps of one row has one profile."""

    def __init__(self, engine: Engine):
        self._decode: int | None = None
        self._has_one_row = DECODE in engine.plans
        self._decodes_of, self._prefills_of = {}, {}  # by batch size; by rows of one sequence
        for index, profile in enumerate(engine.profiles):
            name, (batch, rows) = profile["name"], profile["shapes"]["input_ids"][0]
            if name == DECODE_STEPS:
                self._decode = index
            elif name == PREFILL_STEPS:
                self.prefill = index
            elif name.startswith(DECODE_STEPS):
                self._decodes_of[batch] = index
            else:
                self._prefills_of[rows] = index

    def decode(self, batch: int) -> tuple[str, int]:
        """The plan of a decode step of ``batch`` slots and its profile there."""
        if batch == 1 and self._has_one_row:
            return DECODE, 0
        return PLAN, self._decodes_of.get(batch, self._decode)

    def decodes(self, profile: int) -> bool:
        """Whether that profile of PLAN is one of decode steps."""
        return profile == self._decode or profile in self._decodes_of.values()

    def padded(self, batch: int, rows: int, wanted: int, room: int) -> tuple[int, int]:
        """The profile of a prefill step of ``batch`` slots and ``rows`` rows, of which ``wanted`` have logits, and the rows
        that it runs, at most ``room``, the last of which may be padding."""
        if batch == wanted == 1:
            for size, index in sorted(self._prefills_of.items()):
                if _WORTH_PADDING * size <= rows <= size <= room:
                    return index, size
        return self.prefill, rows
