"""The driver of `--engine ray`: it hands batches of tensors to workers on the machines of a Ray cluster.

The driver makes the unfinished output folder and commits it. Workers (`ray_worker`) plan the merge anew from the
recipe, and write each tensor to its place in the shard files, so that only names and hashes pass through Ray. A batch
whose worker dies is done anew by another one; writing a tensor twice gives the same bytes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from resm_kernels.checkpoint import CheckpointWriter
from resm_kernels.engine.batches import Batch, make_batches
from resm_kernels.engine.costs import REFERENCE, job_work
from resm_kernels.engine.devices import DeviceUse
from resm_kernels.engine.pipeline import Timings
from resm_kernels.engine.plan import MergePlan
from resm_kernels.engine.ray_worker import ClusterError, Merged, MergeWorker, Order, environment, fingerprint
from resm_kernels.engine.rounding import KeptLog
from resm_kernels.options import MergeOptions

ATTEMPTS: Final = 4
"""How many workers may die over one batch, or on one machine in turn, before the merge ends with an error."""
START_SECONDS: Final = 300.0
"""How long the first worker may take to start: other programs may use the cluster's CPUs and GPUs."""
CONNECT_SECONDS: Final = 10.0
"""How long a cluster may take to answer at its address."""
_SESSION: Final = "resm-ray-"
_OBJECT_STORE: Final = 80 * 2**20
"""Bytes of a local cluster's object store, which holds names and hashes only; Ray takes no less."""


def merge_on_ray(
    plan: MergePlan,
    names: Collection[str],
    writer: CheckpointWriter,
    kept: KeptLog,
    progress: Callable[[int, int], None] | None,
) -> Timings:
    """Merge the tensors of these names with the workers of a cluster, and tell `writer` which tensors are on disk.

    `kept` is told how weights fared that were rounded.

    Returns:
        Sums over all workers; `memory_peak` is the largest of one worker.

    Raises:
        ClusterError: Ray is not installed, there is no such cluster, a machine of it cannot take part, or workers died
            over one batch again and again.
        MergeError, CheckpointError: The merge itself fails, as in one process.
    """
    try:
        import ray
    except ImportError as error:
        raise ClusterError("engine: ray is not installed; need pip install 'resm-kernels[ray]'") from error
    library: Any = ray  # some of its functions have no annotations
    jobs = [job for job in plan.jobs if job.name in names]
    if not jobs:
        return Timings()
    with _cluster(library, plan.options), _proof(writer.folder.parent) as proof:
        order = Order(
            recipe=plan.recipe,
            methods=(plan.method, *(own.method for own in plan.recipe.documents.values())),
            written=plan.written,
            options=replace(plan.options, engine="local", address=None, workers=None),
            directory=Path.cwd(),
            folder=writer.folder,
            proof=proof,
            environment=environment(),
            fingerprint=fingerprint(plan),
        )
        places = find_places(library.nodes(), plan.options)
        batches = make_batches(jobs, lambda job: REFERENCE.seconds(job_work(plan.method, job)), len(places))
        return Driver(library, order, places, batches, writer, kept, progress).run()


@dataclass
class Place:
    """Room for one worker: a machine, and the share of it that the worker uses.

    Attributes:
        node: Ray's id of the machine.
        name: The machine's name in messages.
        threads: Threads to compute with.
        gpus: 1 for a worker that computes on a GPU, else 0.
        deaths: How many workers have died here in turn.
    """

    node: str
    name: str
    threads: int
    gpus: int
    deaths: int = 0


def find_places(nodes: Sequence[dict[str, Any]], options: MergeOptions) -> list[Place]:
    """Return the places of all workers on these machines, as `ray.nodes()` lists them.

    Raises:
        ClusterError: A machine has fewer CPUs or GPUs than asked for, or no machine has any.
    """
    places = []
    gpu = options.device != "cpu"
    for node in nodes:
        cpus, gpus = (int(node["Resources"].get(kind, 0)) for kind in ("CPU", "GPU"))
        if not node["Alive"] or not cpus or (gpu and not gpus):
            continue
        count = options.workers or (gpus if gpu else 1)
        threads = options.threads or max(cpus // count, 1)
        name = node["NodeManagerHostname"]
        if count * threads > cpus:
            raise ClusterError(
                f"machine {name}: has {cpus} CPUs for Ray, but {count} workers of {threads} threads need "
                f"{count * threads}; lower workers or threads"
            )
        if gpu and count > gpus:
            raise ClusterError(f"machine {name}: has {gpus} GPUs for Ray, need one for each of {count} workers")
        places += [Place(node["NodeID"], name, threads, int(gpu)) for _ in range(count)]
    if not places:
        raise ClusterError(f"engine: the Ray cluster has no machine with {'a GPU' if gpu else 'a CPU'} for a worker")
    return places


@dataclass
class Driver:
    """Gives batches to workers, the longest first, until all are done.

    Attributes:
        running: For each call that is under way, the worker, its place, and the batch (None while it opens).
        workers: All workers that were started.
    """

    ray: Any
    order: Order
    places: list[Place]
    batches: Sequence[Batch]
    writer: CheckpointWriter
    kept: KeptLog
    progress: Callable[[int, int], None] | None
    running: dict[Any, tuple[Any, Place, Batch | None]] = field(default_factory=dict)
    workers: list[Any] = field(default_factory=list)

    def run(self) -> Timings:
        """Do all batches; when this ends, be it by an error or an interrupt, no worker is left."""
        try:
            return self._run()
        finally:
            for worker in self.workers:
                self.ray.kill(worker)

    def _run(self) -> Timings:
        waiting, idle = deque(self.batches), deque[tuple[Any, Place]]()
        attempts = dict.fromkeys(self.batches, 0)
        total, done = sum(batch.nbytes for batch in self.batches), 0
        has_started, reason = False, ""
        timings, uses = Timings(), dict[str, DeviceUse]()
        for place in self.places:
            self._start(place)
        while waiting or any(batch for *_, batch in self.running.values()):
            finished, _ = self.ray.wait(list(self.running), timeout=None if has_started else START_SECONDS)
            if not finished:
                raise ClusterError(
                    f"engine: no worker started within {START_SECONDS:.0f} s, because other programs use the cluster's "
                    f"CPUs or GPUs; free are {self.ray.available_resources()}"
                )
            worker, place, batch = self.running.pop(finished[0])
            try:
                result = self.ray.get(finished[0])
            except self.ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, (ValueError, OSError)):
                    raise error.cause from None
                raise ClusterError(f"machine {place.name}: {_reason(error)}") from error
            except self.ray.exceptions.RayError as error:
                reason = f" ({_reason(error)})"
                self._replace(place, batch, attempts, reason)
                if batch is not None:
                    waiting.appendleft(batch)
            else:
                has_started, place.deaths = True, 0
                idle.append((worker, place))
                if batch is not None:
                    for kept in result.kept:
                        self.kept.add(kept)
                    self.writer.record(result.hashes)
                    _add(timings, uses, result)
                    done += batch.nbytes
                    if self.progress is not None:
                        self.progress(done, total)
            while waiting and idle:
                self._give(*idle.popleft(), waiting.popleft())
            if waiting and not self.running:
                raise ClusterError(f"engine: no worker is left; the last one died on machine {place.name}{reason}")
        timings.devices = tuple(uses.values())
        return timings

    def _start(self, place: Place) -> None:
        strategy = self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(place.node, soft=False)
        actor = self.ray.remote(MergeWorker).options(
            num_cpus=place.threads, num_gpus=place.gpus, scheduling_strategy=strategy
        )
        worker = actor.remote()
        self.workers.append(worker)
        order = replace(self.order, options=replace(self.order.options, threads=place.threads))
        self.running[worker.open.remote(order)] = (worker, place, None)

    def _give(self, worker: Any, place: Place, batch: Batch) -> None:
        self.running[worker.merge.remote(batch.names)] = (worker, place, batch)

    def _replace(self, place: Place, batch: Batch | None, attempts: dict[Batch, int], reason: str) -> None:
        """Start another worker for one that died, if its machine is there; raise an error if it happens too often."""
        place.deaths += 1
        if batch is not None:
            attempts[batch] += 1
            if attempts[batch] >= ATTEMPTS:
                others = f" and {len(batch.names) - 1} more" if len(batch.names) > 1 else ""
                raise ClusterError(
                    f"tensor {batch.names[0]!r}{others}: {ATTEMPTS} workers died while they merged it, the last one on "
                    f"machine {place.name}{reason}; perhaps its memory is too small: lower memory_limit or workers"
                )
        if place.deaths < ATTEMPTS and any(n["NodeID"] == place.node and n["Alive"] for n in self.ray.nodes()):
            self._start(place)


def _reason(error: Exception) -> str:
    """Return one line of an error of Ray's: the last one if there is a traceback, which says what it leads to."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if any(line.startswith("Traceback") for line in lines) else lines[0]


def _add(timings: Timings, uses: dict[str, DeviceUse], result: Merged) -> None:
    """Add the timings of a batch to those of all."""
    for name in ("read", "write", "read_wait", "compute", "write_wait", "device_wait"):
        setattr(timings, name, getattr(timings, name) + getattr(result.timings, name))
    timings.memory_peak = max(timings.memory_peak, result.timings.memory_peak)
    for use in result.timings.devices:
        before = uses.get(use.name, replace(use, tensors=0, busy=0.0))
        uses[use.name] = replace(
            use,
            tensors=before.tensors + use.tensors,
            busy=before.busy + use.busy,
            memory_peak=max(before.memory_peak, use.memory_peak),
        )


@contextlib.contextmanager
def _proof(folder: Path) -> Iterator[tuple[Path, str]]:
    """Write a file by which workers know that they see this very folder; yield its path and its content."""
    file, content = folder / f".proof-{secrets.token_hex(8)}", secrets.token_hex(16)
    file.write_text(content, encoding="utf-8")
    try:
        yield file, content
    finally:
        file.unlink(missing_ok=True)


@contextlib.contextmanager
def _cluster(ray: Any, options: MergeOptions) -> Iterator[None]:
    """Be connected to a cluster within the context: the caller's, that of the address, or a new one on this machine."""
    if ray.is_initialized():  # the calling program uses Ray, and ends its connection itself
        if options.address is not None:
            raise ClusterError(
                f"address: got {options.address!r}, but this program is connected to a Ray cluster; need None, or "
                "ray.shutdown() before"
            )
        yield
        return
    if options.address is not None:
        _check_address(options.address)
    # Ray's handler would end the process with exit code 1.
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if in_main_thread else None
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    with contextlib.ExitStack() as stack:
        if options.address is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            root = stack.enter_context(_session_folder())
            cpus = max(_cpus(), (options.workers or 1) * (options.threads or 1))
            where = {"address": "local", "num_cpus": cpus, "include_dashboard": False, "_temp_dir": root}
            where["object_store_memory"] = _OBJECT_STORE
        else:
            where = {"address": options.address}
        stack.callback(ray.shutdown)
        try:
            ray.init(**where, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ClusterError(f"address: got {options.address!r}: {_reason(error)}") from error
        finally:
            if handler is not None:
                signal.signal(signal.SIGTERM, handler)
        yield


def _check_address(address: str) -> None:
    """Refuse an address at which nothing answers; Ray would try it for minutes."""
    host, colon, port = address.rpartition(":")
    if address == "auto":
        return
    if not colon or "/" in host or not port.isdecimal() or int(port) > 65535:
        raise ClusterError(f"address: got {address!r}, need HOST:PORT of a Ray cluster with this machine, or auto")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        reason = error.strerror or error
        raise ClusterError(f"address: got {address!r}, where no Ray cluster answers ({reason})") from error


@contextlib.contextmanager
def _session_folder() -> Iterator[str]:
    """Make a folder for the sockets and logs of a local cluster, and delete it and those of processes that are gone."""
    # Paths of sockets may not be long, as those of some systems' folders for temporary files are.
    parent = Path("/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir())
    for old in parent.glob(f"{_SESSION}*-*"):
        number = old.name.removeprefix(_SESSION).partition("-")[0]
        if number.isdecimal() and not _is_alive(int(number)):
            shutil.rmtree(old, ignore_errors=True)
    folder = tempfile.mkdtemp(prefix=f"{_SESSION}{os.getpid()}-", dir=parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _cpus() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
