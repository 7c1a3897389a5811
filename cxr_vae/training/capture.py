"""A function of tensors on a GPU, replayed as one CUDA graph: a step is some 300 kernels, each told to the GPU in turn.

Small batches are done before the next kernel has been told; a graph is told once. The kernels and their numbers are
the same.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

WARM_UP = 3
"""Calls before it is captured, in which libraries settle what they use and torch.compile compiles."""

Result = TypeVar("Result", bound=tuple[Tensor, ...])


class Replayed(Generic[Result]):
    """`function`, whose arguments have the same shapes at each call, whose result is a named tuple of tensors.

    It must look at no tensor's numbers and change only tensors that stay where they are. Arguments may lie on the CPU:
    they are copied to `device`. What it does besides to Python objects is done at the first calls only.
    """

    def __init__(self, function: Callable[..., Result], device: torch.device) -> None:
        self._function, self._device = function, device
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._num_calls = 0

    def __call__(self, *arguments: Tensor) -> Result:
        """The function's result, in tensors of its own."""
        if self._num_calls < WARM_UP:
            self._num_calls += 1
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):  # on which it will be captured: autograd remembers streams
                result = self._function(*arguments)
            torch.cuda.current_stream().wait_stream(self._stream)
            return result
        if self._graph is None:
            self._places = [torch.empty_like(argument, device=self._device) for argument in arguments]
            self._graph = torch.cuda.CUDAGraph()
            # What other threads ask of the GPU meanwhile, such as pinned memory, is their own.
            with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
                self._result = self._function(*self._places)
        for place, argument in zip(self._places, arguments, strict=True):
            place.copy_(argument, non_blocking=True)
        self._graph.replay()
        return type(self._result)(*(tensor.clone() for tensor in self._result))
