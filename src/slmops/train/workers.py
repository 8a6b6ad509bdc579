"""Several single-thread processes that train one adapter together.

Owns: the shared memory in which they add up their gradients, and starting and ending the processes. On a CPU,
two processes of one thread do more than one process of two threads, because a small model's operations are
short and threads meet after each; and on shared cores, threads that spin for each other slow down tenfold.

Every worker holds the whole adapter and the same optimizer state, and makes the same step from the same sums:
they stay equal without ever sending weights. Sums are taken in the order of ranks, so a run repeats to the
bit.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from typing import Any

import torch
import torch.multiprocessing as processes

from slmops.core.errors import BuildError

DEADLINE_S = 900.0  # a step takes seconds; a worker that is silent for so long is gone


@dataclass
class Exchange:
    """What one worker sees of the others.

    Attributes:
        rank: 0 is the process that was called.
        gradients: (workers, parameters) float32, shared; a row is a worker's own to write.
        counts: (workers, 3) float64, shared: summed loss, tokens with loss, examples.
        word: (1,) float64, shared, written by rank 0 only.
        barrier: where all meet.
    """

    rank: int
    gradients: torch.Tensor
    counts: torch.Tensor
    word: torch.Tensor
    barrier: Barrier

    @property
    def workers(self) -> int:
        """How many take part."""
        return int(self.gradients.shape[0])

    def agree(self, value: float) -> float:
        """Return rank 0's value in every worker."""
        if self.rank == 0:
            self.word[0] = value
        self._meet()
        return float(self.word[0])

    def add_up(
        self, parameters: Sequence[torch.Tensor], loss: float, tokens: int, examples: int
    ) -> list[float]:
        """Replace every gradient by its mean per token over all workers.

        Args:
            parameters: leaves whose gradients are of the *summed* loss of this worker's row.
            loss: that sum.
            tokens: how many tokens it sums over.
            examples: in this worker's row.
        Returns: [loss, tokens, examples] over all workers.
        """
        own, at = self.gradients[self.rank], 0
        for leaf in parameters:
            if leaf.grad is not None:
                own[at : at + leaf.numel()] = leaf.grad.flatten()
            at += leaf.numel()
        self.counts[self.rank] = torch.tensor([loss, tokens, examples], dtype=torch.float64)
        self._meet()
        mean = self.gradients.sum(0)
        totals: list[float] = self.counts.sum(0).tolist()
        self._meet()  # nobody writes the next step's row before everybody has read this step's
        mean /= totals[1]
        at = 0
        for leaf in parameters:
            leaf.grad = mean[at : at + leaf.numel()].view_as(leaf)
            at += leaf.numel()
        return totals

    def _meet(self) -> None:
        try:
            self.barrier.wait(DEADLINE_S)
        except threading.BrokenBarrierError as error:
            raise BuildError(
                f"expected {self.workers} training processes, one of them is gone",
                hint="look for its error above, then start again: the run goes on from its checkpoint",
            ) from error


@contextmanager
def together(
    workers: int, parameters: int, target: Callable[..., None], *arguments: Any
) -> Iterator[Exchange]:
    """Start ``workers - 1`` processes that run ``target(exchange, *arguments)``, and yield rank 0's exchange.

    Args:
        workers: at least 1.
        parameters: how many trained numbers there are.
        target: a module-level function.
        arguments: picklable.
    """
    context = processes.get_context("spawn")  # a forked child would inherit torch's threads half dead
    gradients = torch.zeros(workers, parameters).share_memory_()
    counts = torch.zeros(workers, 3, dtype=torch.float64).share_memory_()
    word = torch.zeros(1, dtype=torch.float64).share_memory_()
    barrier = context.Barrier(workers)
    exchanges = [Exchange(rank, gradients, counts, word, barrier) for rank in range(workers)]
    children = [
        context.Process(target=_child, args=(target, exchange, *arguments), daemon=True)
        for exchange in exchanges[1:]
    ]
    for child in children:
        child.start()
    try:
        yield exchanges[0]
    except BaseException:
        barrier.abort()
        raise
    finally:
        for child in children:
            child.join(DEADLINE_S)


def _child(target: Callable[..., None], *arguments: Any) -> None:
    """Run ``target``, but end with the parent, even if the parent was killed."""
    parent = multiprocessing.parent_process()
    if parent:
        threading.Thread(target=_end_with, args=(parent.join,), daemon=True).start()
    target(*arguments)


def _end_with(wait: Callable[[], None]) -> None:
    wait()
    os._exit(1)
