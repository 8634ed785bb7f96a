"""A worker of `--engine ray`: it opens the recipe once, and merges batches of tensors into the driver's shard files.

Nothing here imports ray: the class is an ordinary one, which the driver (`ray_engine`) turns into an actor.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from resm_kernels._backends import backends
from resm_kernels._version import __version__
from resm_kernels.checkpoint import OutputPlan
from resm_kernels.checkpoint.durable import write_errors_named
from resm_kernels.checkpoint.tensor_writer import TensorWriter
from resm_kernels.engine.merge import run_jobs
from resm_kernels.engine.models import MergeError
from resm_kernels.engine.pipeline import Timings
from resm_kernels.engine.plan import MergePlan, plan_merge
from resm_kernels.engine.rounding import Kept
from resm_kernels.methods import Method, register
from resm_kernels.options import MergeOptions
from resm_kernels.recipe import Recipe


class ClusterError(ValueError):
    """A cluster or one of its machines cannot do its part of a merge; the tensors that are done are kept."""


@dataclass(frozen=True)
class Order:
    """What a worker needs to take part in a merge.

    Attributes:
        recipe: The recipe.
        method: Its merge method, which may be one that the driver's program registered.
        options: How one worker merges: in its own process, with its share of the machine's threads.
        directory: The driver's current directory, which relative paths in the recipe start from.
        folder: The unfinished output folder, which the driver has made.
        proof: A file that the driver has made next to it, and what it has written there.
        environment: `environment()` of the driver.
        fingerprint: `fingerprint(plan)` of the driver's plan.
    """

    recipe: Recipe
    method: Method
    options: MergeOptions
    directory: Path
    folder: Path
    proof: tuple[Path, str]
    environment: dict[str, Any]
    fingerprint: dict[str, str]


@dataclass(frozen=True)
class Merged:
    """The result of one batch: the hash of every tensor that is now on disk, and where the time went.

    `kept` says how each weight fared that was rounded.
    """

    hashes: dict[str, str]
    kept: tuple[Kept, ...]
    timings: Timings


class MergeWorker:
    """One worker: `open` once, then `merge` for each batch.

    `open` raises a ClusterError that names a machine that cannot do its part, `merge` the errors of the merge itself.
    """

    def open(self, order: Order) -> str:
        """Check that this machine sees the driver's files and would give the same bits, and return its name."""
        self._name = socket.gethostname()
        with _named(self._name):
            if order.directory.is_dir():  # it need not be here if the recipe's paths are absolute
                os.chdir(order.directory)
            _check_same("software", environment(), order.environment)
            register(order.method)
            _check_folder(*order.proof)
            self._plan = plan_merge(order.recipe, None, order.options)
            _check_same("input", fingerprint(self._plan), order.fingerprint)
            _check_shards(order.folder, self._plan.output)
            self._writer = TensorWriter(order.folder, self._plan.output)
        self._folder = order.folder
        return self._name

    def merge(self, names: Sequence[str]) -> Merged:
        """Merge these tensors and write them; they are on disk when this returns."""
        kept: list[Kept] = []
        try:
            with write_errors_named(self._folder, f" on machine {self._name}"):
                timings = run_jobs(self._plan, frozenset(names), self._writer.write, kept.append)
                hashes = self._writer.flush()
        except MergeError as error:
            if isinstance(error.__cause__, torch.OutOfMemoryError):  # the models are not at fault, so the work is kept
                raise ClusterError(f"machine {self._name}: {error}") from error
            raise
        devices = tuple(replace(use, name=f"{self._name} {use.name}") for use in timings.devices)
        return Merged(hashes, tuple(kept), replace(timings, devices=devices))


def environment() -> dict[str, Any]:
    """What the bits of a merge depend on beside its inputs: versions, and the kernels that run."""
    facts = backends()
    native = facts["native"]["available"]
    return {"resm_kernels": __version__, "torch": torch.__version__, "compiled extension": "yes" if native else "no"}


def fingerprint(plan: MergePlan) -> dict[str, str]:
    """Return a hash for each input file and one for all else that says what is merged and where it is written.

    A file's hash is of the names, dtypes, shapes and places of its tensors. Copies of a model on several machines have
    the same one.
    """
    files: dict[str, list[Any]] = {}
    jobs = []
    for job in plan.jobs:
        inputs = []
        for reader, info in job.inputs:
            files.setdefault(str(info.file), []).append([info.name, str(info.dtype), info.shape, info.offset])
            inputs.append([type(reader).__name__, info.name, str(info.dtype), info.shape])
        held = None if job.matrices is None else (*job.matrices.matrices, job.matrices.transposed)
        jobs.append([job.name, str(job.dtype), job.shape, sorted(job.parameters.items()), inputs, job.copied, held])
        slots = [plan.output.slots[name] for name, *_ in job.stored]
        jobs += [[slot.name, str(slot.dtype), slot.shard, slot.offset, slot.nbytes] for slot in slots]
    parts = {**files, "the plan of the recipe": [plan.recipe.method.name, plan.options.random_seed, jobs]}
    return {name: _hash(part) for name, part in parts.items()}


def _hash(data: Any) -> str:
    text = json.dumps(data, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _check_same(what: str, here: dict[str, Any], there: dict[str, Any]) -> None:
    for name in there | here:
        if here.get(name) != there.get(name):
            values = f"is {here.get(name)} here and {there.get(name)} there"
            found = "is another one here" if what == "input" else values
            raise ClusterError(f"{name}: {found}; need the same {what} as where the merge was started")


def _check_folder(file: Path, content: str) -> None:
    try:
        found = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ClusterError(
            f"{file.parent}: cannot be read here ({error.strerror}); need a file system that all machines share"
        ) from error
    if found != content:
        raise ClusterError(f"{file.parent}: is another folder here; need a file system that all machines share")


def _check_shards(folder: Path, output: OutputPlan) -> None:
    for shard in output.shards:
        file = folder / shard.filename
        fd = os.open(file, os.O_WRONLY)
        try:
            if (size := os.fstat(fd).st_size) != shard.size:
                raise ClusterError(f"{file}: has {size} bytes here, need {shard.size}")
        finally:
            os.close(fd)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Turn errors that a machine's files, software or devices cause into ClusterErrors that name the machine."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ClusterError(f"machine {name}, in {Path.cwd()}: {error}") from error
