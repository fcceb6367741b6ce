"""A training step that is replayed: recorded once as a CUDA graph, so that the CPU launches it as one piece of work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from .errors import Failed, reason_of
from .learners import Step

Taken = tuple[Tensor, Tensor, Tensor | None]
WARM_UP = 3  # steps before one is recorded, in which libraries choose and allocate what they need


class Graph:
    """Work on CUDA that is recorded, and done again on the same memory."""

    def __init__(self) -> None:
        self._graph, self._stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Do what is in the block on the stream that is recorded from, in turn with what is done elsewhere."""
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            yield
        here.wait_stream(self._stream)

    def record(self, work: Callable[[], Taken]) -> Taken:
        """Record ``work`` without doing it; return the tensors that `replay` leaves its results in."""
        # What other threads do meanwhile, such as the loader's that pins images, does not break off the recording.
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            return work()

    def replay(self) -> None:
        self._graph.replay()


class Replayed:
    """Takes steps on whole batches by replaying one, and all others, such as an epoch's last, as they are.

    Args:
        size: samples B of a whole batch.
    """

    def __init__(self, size: int) -> None:
        self._size, self._graph, self._warm = size, Graph(), 0
        self._given: tuple[Tensor, ...] = ()
        self._left: Taken

    def __call__(self, take: Callable[[Step, Tensor], Taken], step: Step, weights: Tensor) -> Taken:
        """Take a step by ``take``, given the weights (B,) of its samples. What it returns the next one overwrites.

        Raises Failed where the step cannot be recorded.
        """
        given = step.index, step.inputs, step.targets, weights
        if not self._given and self._warm == WARM_UP and len(weights) == self._size:
            self._record(take, step, given)
        if not self._given or any(mine.shape != here.shape for mine, here in zip(self._given, given, strict=True)):
            self._warm += not self._given and len(weights) == self._size
            with self._graph.beside():
                return take(step, weights)
        for mine, here in zip(self._given, given, strict=True):
            mine.copy_(here, non_blocking=True)
        self._graph.replay()
        return self._left

    def _record(self, take: Callable[[Step, Tensor], Taken], step: Step, given: tuple[Tensor, ...]) -> None:
        index, inputs, targets, weights = (each.clone() for each in given)
        try:
            self._left = self._graph.record(
                lambda: take(replace(step, index=index, inputs=inputs, targets=targets), weights)
            )
        except RuntimeError as error:
            first = error.__context__ or error  # ending what is broken off raises once more, and says nothing of why
            raise Failed(f"a step cannot be recorded as a CUDA graph ({reason_of(first)}); set graph=false") from None
        self._given = index, inputs, targets, weights
