"""Many small steps on a GPU as one CUDA graph: launched one by one, they take longer to launch than to compute."""

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor

Found = TypeVar("Found")


def replayed(steps: Callable[..., Found]) -> Callable[..., Found]:
    """``steps`` of tensors, called; where those are on a GPU, captured for their shapes and replayed from then on. It may
    change what it is given, must not wait for the GPU, and what it returned is overwritten by its next call there.
    """
    captured: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], Found]] = {}

    @wraps(steps)
    def run(*given: Tensor) -> Found:
        if not given[0].is_cuda:
            return steps(*given)
        key = tuple((each.device, each.dtype, each.shape) for each in given)
        with torch.cuda.device(given[0].device):
            if key not in captured:
                captured[key] = _capture(steps, [each.clone() for each in given])
            graph, places, found = captured[key]
            for place, each in zip(places, given):
                place.copy_(each)
            graph.replay()
        return found

    return run


def _capture(steps: Callable[..., Found], places: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Found]:
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        steps(*places)  # what libraries set up at their first call cannot be captured
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = steps(*places)
    return graph, places, found
