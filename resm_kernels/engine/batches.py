"""Divides a merge into batches of tensors, so that workers who take one after the other end at about the same time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from resm_kernels.engine.tensor_jobs import TensorJob

BATCHES_PER_WORKER: Final = 8
"""More batches end the workers' work more evenly; fewer interrupt less often their reading ahead."""
LONGEST_SECONDS: Final = 20.0
"""The longest batch of several tensors, as predicted: so much work is lost at most when a worker dies."""


@dataclass(frozen=True)
class Batch:
    """Tensors that one worker merges in one go, in the order of the files, and the seconds predicted for them."""

    names: tuple[str, ...]
    nbytes: int
    seconds: float


def make_batches(jobs: Sequence[TensorJob], seconds: Callable[[TensorJob], float], workers: int) -> list[Batch]:
    """Return batches of all jobs, the longest first.

    Jobs that follow each other are read from the disk in sequence, so they make up a batch; a job that is longer than a
    batch ought to be is one by itself.
    """
    costs = [seconds(job) for job in jobs]
    most = min(sum(costs) / (workers * BATCHES_PER_WORKER), LONGEST_SECONDS)
    groups: list[list[tuple[TensorJob, float]]] = []
    room = 0.0
    for job, cost in zip(jobs, costs, strict=True):
        if cost >= most:
            groups.insert(0, [(job, cost)])
        elif cost > room or not groups:
            groups.append([(job, cost)])
            room = most - cost
        else:
            groups[-1].append((job, cost))
            room -= cost
    batches = [
        Batch(tuple(job.name for job, _ in group), sum(job.nbytes for job, _ in group), sum(c for _, c in group))
        for group in groups
    ]
    return sorted(batches, key=lambda batch: -batch.seconds)
