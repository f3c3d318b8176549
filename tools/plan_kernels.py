"""The kernels of a plan of TensorRT-RTX in the order in which it runs them, read from the plan: no GPU is needed.

    python tools/plan_kernels.py PLAN [NAME]     # with NAME, the CUDA source of the first kernel of that name

A plan that is built ahead of time holds its schedule and the source of what its compiler generated as text (seen in 1.6; no
format that NVIDIA documents). A kernel's name tells what was fused into it, its grid how much of a GPU it can use, its
vector width whether it loads one element at a time.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

_MAIN, _END = b"\nmain {", b"\n}\n"
_ENTRY = re.compile(rb'\n +(\w+)=\{ name=("[^"]*"|\S+)')
_NO_KERNELS = {"signal", "wait", "shape_call", "tensor", "sub_tensor"}


@dataclass(frozen=True)
class Kernel:
    """``grid``, ``block`` and ``vector`` are None for a kernel of a library, whose ``kind`` says what it computes."""

    kind: str
    name: str
    grid: tuple[int, ...] | None = None
    block: tuple[int, ...] | None = None
    vector: int | None = None


def kernels(plan: bytes) -> list[Kernel]:
    start = plan.find(_MAIN)
    if start < 0:
        raise ValueError("no schedule of TensorRT-RTX is in this file")
    text, found = plan[start : plan.find(_END, start)], []
    entries = list(_ENTRY.finditer(text))
    for entry, after in zip(entries, [*(each.start() for each in entries[1:]), len(text)]):
        kind, said = entry[1].decode(), text[entry.start() : after]
        if kind in _NO_KERNELS:
            continue
        launch = re.search(rb"grid = \{([\d ]+)\} block = \{([\d ]+)\}", said)
        vector = re.search(rb"vec_width=(\d+)", said)
        shape = [tuple(map(int, numbers.split())) for numbers in launch.groups()] if launch else [None, None]
        found.append(Kernel(kind, entry[2].decode().strip('"'), *shape, int(vector[1]) if vector else None))
    return found


def source(plan: bytes, name: str) -> str:
    """The text around the CUDA source of the first kernel whose name begins with ``name``, from its body on."""
    start = plan.find(b'extern "C" __global__ void ' + name.encode())
    if start < 0:
        raise ValueError(f"no source of {name} is in this file")
    return plan[start : plan.find(b"\0", start)].decode(errors="replace")


def main() -> None:
    plan = Path(sys.argv[1]).read_bytes()
    if len(sys.argv) > 2:
        print(source(plan, sys.argv[2]))
        return
    for kernel in kernels(plan):
        print(kernel.name, *(each for each in (kernel.grid, kernel.block, kernel.vector) if each), sep="  ")


if __name__ == "__main__":
    main()
