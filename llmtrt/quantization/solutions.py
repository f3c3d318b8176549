"""What calibration found, kept on disk layer by layer."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmtrt import files


@dataclass(frozen=True)
class Solution:
    """``q``: int8 [N, K] with values −8 … 7; ``scale``: fp32 [N, K / block] with values of the recipe's dtype; ``error``:
    ‖(W − Ŵ) x‖ / ‖W x‖ over the calibration's inputs x."""

    q: np.ndarray
    scale: np.ndarray
    error: float


class Solutions:
    """Solutions by the weight's name, in one file of ``folder`` for each layer."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._where: dict[str, Path] = {}
        for path in sorted(folder.glob("layer-*.npz")):
            with np.load(path, allow_pickle=False) as content:
                self._where |= {key.removesuffix("/q"): path for key in content.files if key.endswith("/q")}

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __getitem__(self, name: str) -> Solution:
        with np.load(self._where[name], allow_pickle=False) as content:
            return Solution(content[f"{name}/q"], content[f"{name}/scale"], float(content[f"{name}/error"]))

    def clear(self) -> None:
        for path in self._folder.glob("layer-*.npz"):
            path.unlink()
        self._where = {}

    def save(self, layer: int, found: dict[str, Solution]) -> None:
        path = self._folder / f"layer-{layer:05}.npz"
        arrays = {
            f"{name}/{field}": np.asarray(getattr(solution, field))
            for name, solution in found.items()
            for field in ("q", "scale", "error")
        }
        with files.staged_file(path) as staging, staging.open("wb") as file:
            np.savez(file, **arrays)
        self._where |= dict.fromkeys(found, path)
