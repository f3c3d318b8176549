"""The external-data file of a package: tensors appended one after the other, never held together in memory."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir

# What both runtimes and mmap are content with.
ALIGNMENT = 4096
NUMPY = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}


class WeightFile:
    """Appends arrays to ``folder / name`` and returns the ir.ExternalTensor that stands for each; a context manager."""

    def __init__(self, folder: Path, name: str):
        self._folder, self._name = folder, name
        self._file = (folder / name).open("wb")

    def append(
        self, name: str, array: np.ndarray, dtype: ir.DataType | None = None, shape: tuple[int, ...] | None = None
    ) -> ir.ExternalTensor:
        """Writes ``array``'s bytes; ``dtype`` and ``shape`` say what they are where they are packed."""
        self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        array = np.ascontiguousarray(array)
        array.view(np.uint8).reshape(-1).tofile(self._file) if array.size else None
        return ir.ExternalTensor(
            self._name,
            offset,
            array.nbytes,
            dtype or ir.DataType.from_numpy(array.dtype),
            shape=ir.Shape(shape or array.shape),
            name=name,
            base_dir=self._folder,
        )

    def __enter__(self) -> "WeightFile":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
