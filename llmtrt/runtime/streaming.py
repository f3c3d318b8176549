"""How many bytes of a weight-streaming engine's weights stay on the GPU."""

from dataclasses import dataclass
from typing import Self

from llmtrt.errors import UserError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


@dataclass(frozen=True)
class WeightBudget:
    """``auto`` (both None): all that fits beside KV cache and activations; or ``size`` bytes; or ``percent`` of the
    weights that can be streamed."""

    size: int | None = None
    percent: float | None = None

    @classmethod
    def parse(cls, said: "str | int | WeightBudget") -> Self:
        """``auto``, "50%", a number of bytes, or one with a unit (k, M, G, Ki, Mi, Gi, with or without B)."""
        if isinstance(said, cls):
            return said
        text = str(said).strip().lower()
        try:
            if text == "auto":
                return cls()
            if text.endswith("%"):
                percent = float(text[:-1])
                if not 0 <= percent <= 100:
                    raise ValueError
                return cls(percent=percent)
            number = text.removesuffix("b").rstrip("kmgi")
            size = round(float(number) * _UNITS[text.removesuffix("b")[len(number) :]])
            if not 0 <= size < 1 << 60:
                raise ValueError
            return cls(size=size)
        except (ValueError, KeyError, OverflowError):
            raise UserError(
                f"a weight budget should be auto, a share as 50%, or a size as 4G or 4000000000, but is {said!r}"
            ) from None

    def resolve(self, streamable: int, room: int, scratch: int) -> int:
        """Bytes from 0 to ``streamable`` to keep on the GPU, where weights may take ``room`` bytes.

        TensorRT's get_weight_streaming_automatic_budget is not asked: its binding cuts the number to 32 bits (2.54 GB
        came as −1.75 GB), and it knows nothing of the KV cache. ``scratch``: what streaming takes as soon as not all fit.
        """
        if self.size is not None:
            return min(self.size, streamable)
        if self.percent is not None:
            return int(streamable * self.percent / 100)
        return streamable if streamable <= room else max(0, room - scratch)
