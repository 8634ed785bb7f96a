"""The executor on GPUs, with doubles that copy as late as they may: bits, order, bounds, balance, every failure."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from late_device import LateDevice
from torch import Tensor

from resm_kernels.checkpoint import CheckpointReader, TensorInfo
from resm_kernels.checks import Check
from resm_kernels.engine import MergeError, Window
from resm_kernels.engine.cpu_executor import CpuExecutor
from resm_kernels.engine.device_memory import DeviceMemory, device_need
from resm_kernels.engine.gpu_executor import GpuExecutor
from resm_kernels.engine.pipeline import Pipeline
from resm_kernels.engine.ring import Ring
from resm_kernels.engine.window import Job

DTYPES = [torch.bfloat16, torch.float32, torch.float64]
HOST = "host"
"""Part of the names of jobs that need no device."""


@dataclass
class Stored:
    """A reader of tensors in memory; `fail` is called before each reading."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    fail: Callable[[str], None] = lambda name: None

    def read_into(self, info: TensorInfo, buffer: Tensor) -> None:
        self.fail(info.name)
        buffer.copy_(self.tensors[info.name])

    def add(self, name: str, tensor: Tensor) -> TensorInfo:
        self.tensors[name] = tensor
        return TensorInfo(name, tensor.dtype, tuple(tensor.shape), Path("none"), 0, tensor.nbytes)


def make_jobs(sizes: Sequence[int | tuple[int, int, int]], reader: Stored | None = None, host: Sequence[int] = ()):
    """Jobs of so many elements, inputs and bytes of workspace (or only elements: two inputs, no workspace)."""
    reader, jobs = reader or Stored(), []
    generator = torch.Generator().manual_seed(0)
    for i, size in enumerate(sizes):
        n, n_inputs, workspace = size if isinstance(size, tuple) else (size, 2, 0)
        name = f"{HOST if i in host else 'tensor'} {i}"
        dtypes = [DTYPES[(i + t) % len(DTYPES)] for t in range(n_inputs)]
        tensors = [torch.randn(n, generator=generator, dtype=torch.float64).to(d) for d in dtypes]
        infos = [reader.add(f"{name}/{t}", tensor) for t, tensor in enumerate(tensors)]
        output = n * (dtypes[0].itemsize if i in host else 4)
        jobs.append(Job(name, tuple((cast(CheckpointReader, reader), info) for info in infos), output, workspace))
    return jobs


def merged(job: Job, tensors: list[Tensor]) -> Tensor:
    if HOST in job.name:
        return tensors[0]
    return sum(t.double() * (i + 1) for i, t in enumerate(tensors)).float()


def started(job: Job, tensors: list[Tensor]) -> tuple[Tensor, list[Check]]:
    result = merged(job, tensors)
    return result, [(result.sum()[None], lambda total: check_sum(job, total))]


def check_sum(job: Job, total: Tensor) -> None:
    assert hasattr(total, "is_back")  # the check gets the values that were copied out, not those on the device
    if "bad" in job.name or not torch.isfinite(total).all():
        raise MergeError(f"{job.name} is bad")


def is_copied(job: Job) -> bool:
    return HOST in job.name


class Run:
    """A pipeline of these jobs, what it wrote, in order, and what its devices saw."""

    def __init__(
        self, jobs, devices=None, limit=1 << 20, compute=started, copy=merged, write=None, window=None, progress=None
    ) -> None:
        self.written: list[tuple[str, Tensor]] = []
        self.devices = [LateDevice()] if devices is None else devices
        self.pipeline = Pipeline(
            jobs,
            Window.for_gpus(jobs, limit) if window is None else window,
            GpuExecutor(self.devices, compute, is_copied=is_copied, copy=copy),
            write or (lambda job, result: self.written.append((job.name, result.clone()))),
            progress,
        )

    def __call__(self):
        before = threading.active_count()
        try:
            return self.pipeline.run()
        finally:
            assert [d.problems for d in self.devices] == [[]] * len(self.devices)
            assert threading.active_count() == before
            assert not any(d._pinned or d._in or d._out for d in self.devices)

    def fails(self, error: type[BaseException], match: str | None = None, written: int | None = None) -> BaseException:
        with pytest.raises(error, match=match) as caught:
            self()
        names = [name for name, _ in self.written]
        assert names == [j.name for j in self.pipeline.jobs[: len(names)]]
        assert written in (None, len(names))
        return caught.value


@given(
    sizes=st.lists(
        st.tuples(st.integers(0, 300), st.integers(1, 4), st.sampled_from([0, 0, 500, 4000])), min_size=1, max_size=12
    ),
    host=st.sets(st.integers(0, 11), max_size=3),
    limit=st.sampled_from([1, 2000, 10_000, 1 << 20]),
    slack=st.integers(0, 10_000),
    lags=st.lists(st.lists(st.sampled_from([0, 1, 2, 5, 1000]), min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_results_are_the_cpus_whatever_the_devices_and_their_timing(sizes, host, limit, slack, lags) -> None:
    jobs = make_jobs(sizes, host=sorted(host))
    expected: list[tuple[str, Tensor]] = []
    window, cpu = Window.for_cpu(jobs, limit), CpuExecutor(merged)
    Pipeline(jobs, window, cpu, lambda job, t: expected.append((job.name, t.clone()))).run()
    memory = max(map(device_need, jobs)) + slack
    devices = [LateDevice(f"cuda:{i}", memory, lags=device_lags) for i, device_lags in enumerate(lags)]
    seen: list[tuple[int, int]] = []

    def compute(job: Job, tensors: list[Tensor]) -> tuple[Tensor, list[Check]]:
        devices[int(threading.current_thread().name[-1])].allocate_for_a_while(job.workspace)
        return started(job, tensors)

    run = Run(jobs, devices, limit, compute, progress=lambda done, total: seen.append((done, total)))
    timings = run()
    assert [name for name, _ in run.written] == [job.name for job in jobs]
    for (_, found), (_, tensor) in zip(run.written, expected, strict=True):
        assert found.dtype == tensor.dtype
        assert torch.equal(found.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
    total = sum(j.input_bytes + j.output_bytes for j in jobs)
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)
    window = run.pipeline.window
    assert 0 < timings.memory_peak <= window.bound
    assert window.bound <= max(limit, max(j.input_segment for j in jobs) + max(j.output_segment for j in jobs))
    assert sum(use.tensors for use in timings.devices) == sum(HOST not in j.name for j in jobs)
    for device, use in zip(devices, timings.devices, strict=True):
        assert device.peak <= use.memory_peak <= use.memory_limit == memory


def test_copies_there_go_on_while_a_tensor_is_merged() -> None:
    device, jobs = LateDevice(), make_jobs([50] * 4)

    def compute(job: Job, tensors: list[Tensor]) -> tuple[Tensor, list[Check]]:
        if job.name == "tensor 0":
            assert wait_until(lambda: device.began == 4)
        return started(job, tensors)

    Run(jobs, [device], compute=compute)()


def wait_until(condition: Callable[[], bool]) -> bool:
    """Give other threads time, much more than they need, to make a condition true."""
    done = threading.Event()
    for _ in range(2000):
        if condition():
            return True
        done.wait(0.005)
    return False


def test_a_tensors_memory_is_read_into_again_when_its_copy_there_is_done_not_its_merge() -> None:
    reader, reading = Stored(), []
    jobs = make_jobs([100] * 6, reader)
    inputs, outputs = 2 * max(j.input_segment for j in jobs), sum(j.output_segment for j in jobs)
    window = Window(inputs=inputs, outputs=outputs, workspace=0)
    reader.fail = reading.append

    def compute(job: Job, tensors: list[Tensor]) -> tuple[Tensor, list[Check]]:
        if job.name == "tensor 0":
            assert wait_until(lambda: len(reading) == 12)  # two for each of six: the ring holds two
        return started(job, tensors)

    Run(jobs, window=window, compute=compute)()


@pytest.mark.parametrize("most", [1, 2, 4])
def test_a_device_takes_tensors_while_they_fit(most: int) -> None:
    jobs = make_jobs([(128, 3, 3000)] * 6)  # of every dtype one input: all need the same
    need = device_need(jobs[0])
    device = LateDevice(memory_limit=3000 + most * (need - 3000) + 100)

    def compute(job: Job, tensors: list[Tensor]) -> tuple[Tensor, list[Check]]:
        if job.name == "tensor 0":
            assert wait_until(lambda: device.began == most)
        return started(job, tensors)

    (use,) = Run(jobs, [device], compute=compute)().devices
    assert device.most == most
    assert use.memory_peak == device.memory_limit - 100


def test_the_largest_workspace_under_way_is_kept_free() -> None:
    large, small = make_jobs([(100, 2, 5000), (100, 2, 0)])
    memory = DeviceMemory(device_need(large) + 500)
    memory.take(large)
    assert not memory.has_room(small)  # large may not have been merged yet
    assert memory.could_hold(small)
    memory.give_back(large)
    assert memory.has_room(small)
    assert (memory.held, memory.peak) == (0, device_need(large))


def test_a_tensor_that_fits_nowhere_is_named_before_anything_begins() -> None:
    jobs = make_jobs([10, (1000, 3, 5000), 10])
    devices = [LateDevice("cuda:0", 1000), LateDevice("cuda:1", 20_000)]
    problem = (
        r"tensor 'tensor 1': needs 23.4 kB \(14.0 kB inputs, 4.0 kB result, 5.0 kB workspace\) on the GPU, but cuda:1 "
        r"is to hold 20.0 kB; need device_memory of at least 23432 bytes, or device: cpu"
    )
    Run(jobs, devices).fails(MergeError, problem, written=0)
    assert devices[0].began == devices[1].began == 0
    # What only the larger one holds goes there.
    devices[1].memory_limit = device_need(jobs[1])
    timings = Run(jobs, devices)()
    assert timings.devices[1].tensors >= 1


def test_tensors_go_to_the_device_with_the_fewest_bytes_under_way() -> None:
    jobs = make_jobs([1000, 300, 300, 300, 300, 300])
    devices = [LateDevice("cuda:0"), LateDevice("cuda:1")]
    went: dict[str, int] = {}

    def compute(job: Job, tensors: list[Tensor]) -> tuple[Tensor, list[Check]]:
        went[job.name] = int(threading.current_thread().name[-1])
        assert wait_until(lambda: sum(d.began for d in devices) == len(jobs))
        return started(job, tensors)

    Run(jobs, devices, compute=compute)()
    expected, held_bytes = [], [0, 0]
    for job in jobs:
        expected.append(held_bytes.index(min(held_bytes)))
        held_bytes[expected[-1]] += device_need(job)
    assert [went[j.name] for j in jobs] == expected
    assert expected != [0, 1, 0, 1, 0, 1]


def failing(stage: str, at: int, error: BaseException) -> Callable[[str], None]:
    """Raises at the `at`-th call for that stage."""
    count = 0

    def fail(now: str) -> None:
        nonlocal count
        count += now.startswith(stage)
        if now.startswith(stage) and count == at + 1:
            raise error

    return fail


@pytest.mark.parametrize(("stage", "count"), [("copy_in", 1), ("copy_in", 2), ("run", 1), ("copy_out", 1)])
@pytest.mark.parametrize("at", [0, 3, 7])
def test_a_failure_on_a_device_is_raised_when_the_tensors_before_are_written(stage: str, count: int, at: int) -> None:
    fail = failing(stage, at, RuntimeError("device lost"))
    devices = [LateDevice(f"cuda:{i}", lags=(i,), fail=fail) for i in range(count)]
    Run(make_jobs([40] * 16), devices, limit=2000).fails(RuntimeError, "device lost", written=at)


@pytest.mark.parametrize("stage", ["copy_in", "run"])
def test_a_device_out_of_memory_is_an_error_that_names_tensor_need_and_limit(stage: str) -> None:
    jobs = make_jobs([(500, 2, 700)] * 4)
    no_memory = torch.OutOfMemoryError("CUDA out of memory.\nMore")
    device = LateDevice(memory_limit=50_000, fail=failing(stage, 2, no_memory))
    problem = (
        r"tensor 'tensor 2': cuda:0 has no memory left: the tensor needs \S+ kB \(.*\), device_memory is 50.0 kB, of "
        r"which \S+ kB are for tensors in flight; lower device_memory.*\(CUDA out of memory.\)$"
    )
    error = Run(jobs, [device]).fails(MergeError, problem, written=2)
    assert isinstance(error.__cause__, torch.OutOfMemoryError)


def test_errors_come_in_the_order_of_the_tensors() -> None:
    """A check that fails late is raised, not a failure of a later tensor that was known before."""
    jobs = make_jobs([40] * 8)
    jobs[2] = Job("bad 2", jobs[2].inputs, jobs[2].output_bytes, 0)
    devices = [LateDevice("cuda:0"), LateDevice("cuda:1")]
    failed = threading.Event()

    def compute(job: Job, tensors: list[Tensor]) -> tuple[Tensor, list[Check]]:
        if int(job.name[-1]) > 2:
            failed.set()
            raise MergeError("of a later tensor")
        if job.name == "bad 2":
            assert failed.wait(10)
        return started(job, tensors)

    Run(jobs, devices, compute=compute).fails(MergeError, "bad 2 is bad", written=2)


def test_a_failing_host_job_is_raised_in_its_turn() -> None:
    jobs = make_jobs([40] * 6, host=[4])

    def refuse(job: Job, tensors: list[Tensor]) -> Tensor:
        raise MergeError("differs")

    Run(jobs, copy=refuse).fails(MergeError, "differs", written=4)


@pytest.mark.parametrize("error", [OSError(5, "on fire"), KeyboardInterrupt()])
def test_a_failure_of_reading_or_writing_or_an_interrupt_stops_all(error: BaseException) -> None:
    reader = Stored()
    jobs = make_jobs([40] * 12, reader)
    devices = [LateDevice("cuda:0"), LateDevice("cuda:1", lags=(3,))]
    reader.fail = failing("tensor 7", 1, error)
    Run(jobs, devices, limit=2000).fails(type(error))
    reader.fail = lambda name: None

    def write(job: Job, result: Tensor) -> None:
        if job.name == "tensor 5":
            raise error

    Run(jobs, devices, limit=2000, write=write).fails(type(error))
    calls: list[int] = []

    def progress(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == 2:
            raise error

    Run(jobs, devices, limit=1000, progress=progress).fails(type(error))


@given(
    stage=st.sampled_from(["read", "copy_in", "run", "copy_out", "write", "progress"]),
    at=st.integers(0, 11),
    count=st.integers(1, 3),
    lag=st.sampled_from([0, 2, 1000]),
    limit=st.sampled_from([1, 2000, 1 << 20]),
)
def test_a_failure_anywhere_ends_all_with_that_error_and_no_gap(stage, at, count, lag, limit) -> None:
    reader = Stored()
    jobs = make_jobs([(40 + i, 2, 100 * i) for i in range(12)], reader, host=[5])
    fail = failing(stage, at, ArithmeticError(stage))
    reader.fail = lambda name: fail("read")
    memory = 2 * max(map(device_need, jobs))
    devices = [LateDevice(f"cuda:{i}", memory, lags=(lag, i), fail=fail) for i in range(count)]

    def write(job: Job, result: Tensor) -> None:
        fail("write")
        run.written.append((job.name, result.clone()))

    run = Run(jobs, devices, limit, write=write, progress=lambda done, total: fail("progress"))
    # Eleven jobs go to devices; all may have been written when progress is first called.
    if at == 11 and stage in ("copy_in", "run", "copy_out"):
        run()
        assert len(run.written) == len(jobs)
    elif stage == "progress" and at > 0:
        with contextlib.suppress(ArithmeticError):
            run()
    else:
        run.fails(ArithmeticError, stage)
    for job, (_, result) in zip(jobs, run.written, strict=False):
        assert torch.equal(result, merged(job, [reader.tensors[info.name] for _, info in job.inputs]))


def test_a_result_of_another_size_is_refused() -> None:
    def compute(job: Job, tensors: list[Tensor]) -> tuple[Tensor, list[Check]]:
        return started(job, tensors)[0].double(), []

    Run(make_jobs([40]), compute=compute).fails(MergeError, "'tensor 0': merging it made 320 bytes, need 160")


def test_no_jobs() -> None:
    timings = Run([])()
    assert timings.devices[0].tensors == 0


def test_memory_that_cannot_be_pinned_is_an_error_before_anything_is_read() -> None:
    reader, read = Stored(), []
    jobs = make_jobs([40], reader)
    reader.fail = read.append

    class Unpinnable(LateDevice):
        def pinned(self, memory: Tensor):
            raise MergeError("could not be pinned")

    Run(jobs, [Unpinnable()]).fails(MergeError, "could not be pinned", written=0)
    assert read == []


@given(
    size=st.integers(64, 2000),
    steps=st.lists(st.tuples(st.integers(1, 700), st.integers(0, 5), st.booleans()), max_size=40),
)
def test_segments_of_a_ring_never_overlap_in_whatever_order_they_come_back(size, steps) -> None:
    ring, live = Ring(size, 0), {}
    for nbytes, index, give_back in steps:
        if give_back and live:
            start = list(live)[index % len(live)]
            del live[start]
            ring.free(start)
        elif nbytes <= size and (start := ring.allocate(nbytes)) is not None:
            assert 0 <= start <= size - nbytes
            assert all(start + nbytes <= s or s + n <= start for s, n in live.items())
            live[start] = nbytes
        assert sum(live.values()) <= ring.used <= size
    for start in list(live):
        ring.free(start)
    assert ring.used == 0
    assert ring.allocate(size) == 0


def test_staging_window_shares_out_its_bytes_by_what_goes_in_and_out() -> None:
    jobs = make_jobs([(1000, 4, 10**6)] * 50)
    window = Window.for_gpus(jobs, 200_000)
    assert window.workspace == 0
    assert 199_000 < window.bound <= 200_000
    assert math.isclose(window.inputs / window.outputs, jobs[0].input_segment / jobs[0].output_segment, rel_tol=0.3)
    uneven = make_jobs([0, (82, 4, 0)])
    need = uneven[1].input_segment + uneven[1].output_segment
    assert Window.for_gpus(uneven, need).bound == need  # whatever the shares
    tight = Window.for_gpus(jobs, 1)
    assert tight.bound == max(j.input_segment for j in jobs) + max(j.output_segment for j in jobs)
