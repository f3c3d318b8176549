"""TensorRT's messages, kept so that a failure can say why in one sentence."""

import re
from typing import Any

from llmtrt.engine.flavor import Flavor

OUT_OF_MEMORY = "out of memory"  # in CUDA's own words, as TensorRT logs them
_KEPT = 50
_LONGEST = 400
# What the driver-less machine of an ahead-of-time build adds to every error, and C++ places that help nobody.
_NOISE = re.compile(r"catchCudaError|getCurrentCC")
# What the builder says of each profile, and of the weights of all, while it logs at INFO.
_MEMORY = re.compile(r"Total (Activation|Weights) Memory: (\d+) bytes")
_PLACE = re.compile(r"\s*\(?\bIn \w+ at /\S+?:\d+\)?|\[\w+\.\w+:+[^\]]*\]\s*|I\w+::\w+: Error Code \d+: ")


def make_logger(flavor: Flavor) -> Any:
    """An ILogger of the flavor with ``reason() -> str``: the first error since ``clear()``, or an empty string.

    ``activations`` and ``weights`` are what a build said since then of the GPU memory that its plan will take, in bytes:
    one entry for each profile at its largest shapes, and None until it is said.

    It prints nothing. TensorRT may call it from any thread and keeps no reference of its own: hold it as long as what
    was made with it.
    """
    trt = flavor.module

    class Logger(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.clear()

        def log(self, severity, message):
            if severity <= trt.ILogger.Severity.ERROR and len(self.errors) < _KEPT:
                self.errors.append(message)
            elif found := _MEMORY.search(message):
                if found[1] == "Weights":
                    self.weights = int(found[2])
                else:
                    self.activations.append(int(found[2]))

        def reason(self) -> str:
            texts = [error for error in self.errors if not _NOISE.search(error)] or self.errors
            return sentence(texts[0]) if texts else ""

        def clear(self) -> None:
            self.errors: list[str] = []
            self.activations: list[int] = []
            self.weights: int | None = None

    return Logger()


def sentence(message: str) -> str:
    """One line of a message of TensorRT, without the places in its source."""
    lines = [line for line in message.splitlines() if line.strip() and not _NOISE.search(line)]
    text = " ".join(_PLACE.sub("", " ".join(lines)).split())
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " …"
