"""Polishing: a few steps that bring a merged model's predictions near the experts' own, on the experts' answers.

`write_targets` asks one expert what it predicts and writes that to a file; `polish` then trains the merged model
towards all of these files. So no two models are in memory at once.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from resm_kernels.calibrate.activations import padded_inputs
from resm_kernels.calibrate.errors import CalibrationError
from resm_kernels.calibrate.prompts import Sample
from resm_kernels.checkpoint.durable import reserve

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int], None]
"""Called with the number of steps done and the number of all steps."""

_TARGET_DTYPES: Final = {torch.float16: np.float16, torch.float32: np.float32}
_BETAS: Final = (0.9, 0.98)
"""AdamW's decay rates: with the usual 0.999, forty steps would hardly forget the gradients of the warm-up."""
_LARGEST_NORM: Final = 1.0
"""Gradients are scaled down to this norm, so that one odd batch cannot throw the model far away."""


@dataclass(frozen=True, kw_only=True)
class PolishOptions:
    """How long and how hard to polish.

    Rate and batch were chosen on validation of the 3H benchmark's small models, among rates of 1e-4 to 1e-3 and batches
    of 8 to 64, after least squares with 800 prompts an expert.

    Attributes:
        steps: Steps of AdamW without weight decay; 0 only measures the KL.
        learning_rate: The peak of the learning rate. Larger models need smaller ones, about as 1/width.
        batch: Samples of each expert in a step, drawn without repetition until all of the expert's were there.
        warmup: Steps over which the rate rises linearly to its peak, from where it falls as a cosine to 0.
        held_out: The share of each expert's samples that is never trained on, rounded, but at least one sample.
        evaluate_every: Steps between two measurements on the samples held out; the last step is always measured.
        seed: Decides which samples are held out and the order of the others.
        gradient_checkpointing: Whether layers are computed again in the backward pass instead of being kept, which
            needs a third more time and far less memory. The bits may differ from those without.
    """

    steps: int = 40
    learning_rate: float = 3e-4
    batch: int = 32
    warmup: int = 4
    held_out: float = 0.1
    evaluate_every: int = 10
    seed: int = 0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("batch", 1), ("warmup", 0), ("evaluate_every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, need at least {least}")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate: got {self.learning_rate}, need a finite number above 0")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out: got {self.held_out}, need a share above 0 and below 1")


@dataclass(frozen=True)
class HeldOutKL:
    """KL(expert ‖ student) on the samples held out, in nats per answer position.

    Attributes:
        step: Steps taken before the measurement.
        experts: The mean over each expert's answer positions.
        mean: The mean of `experts`: every expert counts the same.
    """

    step: int
    experts: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.experts) / len(self.experts)


@dataclass(frozen=True)
class PolishReport:
    """What polishing did.

    Attributes:
        steps: Steps taken.
        held_out: The positions of each expert's samples that were held out.
        evaluations: The measurements on the samples held out, from step 0 to the last.
        kept: The measurement whose weights the student has now: the one with the least mean, the first of equals.
    """

    steps: int
    held_out: tuple[tuple[int, ...], ...]
    evaluations: tuple[HeldOutKL, ...]
    kept: HeldOutKL


def write_targets(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    file: Path,
    *,
    dtype: torch.dtype = torch.float16,
    batch_tokens: int = 4096,
) -> None:
    """Write log p(· | tokens before) of an expert at each answer position of its samples.

    The answer positions of a sample are answer_start − 1 … len(tokens) − 2: those whose next token is the answer's.

    Args:
        model: The expert, on any device; its dtype decides the arithmetic, but logarithms are taken in float32.
        samples: The expert's own samples; at least one.
        file: An .npy file with one row for each answer position, in the samples' order, and one column for each token
            of the vocabulary. It appears whole or not at all; one that exists is replaced.
        dtype: float16 or float32. float16 halves the file. It changes log p by a factor within 1 ± 2⁻¹¹, and so no
            probability by more than 2⁻¹¹/e = 0.0002. Values below its range become its least, -65504, whose
            exponential is 0 as well.
        batch_tokens: At most how many tokens, padding included, are read at once; a longer sample is read alone. The
            logits of a batch take this times the size of the vocabulary times 4 bytes, up to three times over.

    Raises:
        CalibrationError: No samples, predictions with NaN, or a file that cannot be written.
        ValueError: Another dtype.

    The same samples, options, device and number of threads give the same bits.
    """
    if not samples:
        raise CalibrationError("samples: got none, need at least one")
    if dtype not in _TARGET_DTYPES:
        raise ValueError(f"dtype: got {dtype}, need torch.float16 or torch.float32")
    starts = _row_starts(samples)
    lowest = torch.finfo(dtype).min
    aside = file.with_name(f".{file.name}-{os.getpid()}")
    rows: np.memmap | None = None
    model.eval()
    try:
        with torch.inference_mode():
            for chosen in batches_by_length(samples, batch_tokens):
                log_probs = answer_log_probs(model, [samples[i] for i in chosen])
                if bool(log_probs.isnan().any()):
                    raise CalibrationError(
                        f"model: predicts NaN for samples among {sorted(chosen)}, need finite predictions"
                    )
                if rows is None:
                    shape = (starts[-1], log_probs.shape[1])
                    rows = np.lib.format.open_memmap(aside, mode="w+", dtype=_TARGET_DTYPES[dtype], shape=shape)
                    # Writing to a memory map on a full disk would end the process.
                    with open(aside, "r+b") as stream:
                        reserve(stream.fileno(), os.fstat(stream.fileno()).st_size)
                values = log_probs.clamp(min=lowest).to(dtype).cpu().numpy()
                begin = 0
                for i in chosen:
                    count = starts[i + 1] - starts[i]
                    rows[starts[i] : starts[i + 1]] = values[begin : begin + count]
                    begin += count
        assert rows is not None  # there is at least one sample
        rows.flush()
        aside.replace(file)
    except OSError as error:
        raise CalibrationError(f"{file}: cannot be written: {error.strerror or error}") from error
    finally:
        aside.unlink(missing_ok=True)


def polish(
    student: PreTrainedModel,
    samples: Sequence[Sequence[Sample]],
    targets: Sequence[Path],
    options: PolishOptions = PolishOptions(),
    progress: Progress | None = None,
) -> PolishReport:
    """Train a merged model, in place, towards every expert on that expert's own answers.

    Each step lowers 1/T·Σ_t 1/|P_t|·Σ_{p ∈ P_t} KL(q_t,p ‖ p_θ,p), where P_t are the answer positions of the step's
    samples of expert t, q_t,p what the expert predicts there, and p_θ,p what the student does. So every expert counts
    the same, however long its answers are. torch's AdamW takes the steps; see `PolishOptions`.

    A share of the samples is held out. The weights with the least mean KL there are the ones that the student has in
    the end, those of the start among them: polishing never makes that KL worse.

    Args:
        student: The merged model, all of its parameters in float32 (the master copies; round when saving), on any
            device. Tied parameters stay tied.
        samples: For each expert its samples, at least two.
        targets: For each expert the file that `write_targets` wrote from the same samples. It is read through a memory
            map, a batch at a time.
        options: How long and how hard.
        progress: Called after every step.

    Returns:
        What was measured on the samples held out.

    Memory: 20 bytes for each parameter (weights, gradients and AdamW's two moments on the student's device, a copy of
    the best weights on the CPU); the activations of one expert's part of a batch; and for its logits at most 24 bytes
    times `batch`, the vocabulary, and the positions from the first answer's start to the longest sample's end.

    Raises:
        CalibrationError: Too few samples or files, a file from other samples or another vocabulary, a student that is
            not in float32, or a loss that is not finite. In the last case the student is left as it was at that step.

    On the CPU the same arguments and number of threads give the same bits; on a GPU they do where torch's kernels do
    (`torch.use_deterministic_algorithms`). torch's own random numbers are neither used nor changed: dropout is off.
    """
    others = sorted({str(p.dtype) for p in student.parameters() if p.dtype != torch.float32})
    if others:
        raise CalibrationError(f"student: has parameters in {', '.join(others)}, need all in torch.float32")
    if not samples or len(samples) != len(targets):
        raise CalibrationError(
            f"targets: got {len(targets)} files for {len(samples)} experts, need one for each of them"
        )
    experts = [
        _Expert(f"samples[{t}]", own, file, options, t)
        for t, (own, file) in enumerate(zip(samples, targets, strict=True))
    ]
    trained = list(student.parameters())  # a tied parameter is there once
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, betas=_BETAS, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, options))
    with _no_dropout(student, options.gradient_checkpointing):
        kept = _measure(student, experts, options.batch, step=0)
        best = [parameter.detach().to("cpu", copy=True) for parameter in trained]
        evaluations = [kept]
        for step in range(1, options.steps + 1):
            for expert in experts:
                total, positions = expert.divergence(student, next(expert.batches))
                _check_finite(total.item(), f"the sum of KL of {expert.name} in step {step}")
                (total / (positions * len(experts))).backward()
            torch.nn.utils.clip_grad_norm_(trained, _LARGEST_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % options.evaluate_every == 0 or step == options.steps:
                measured = _measure(student, experts, options.batch, step)
                evaluations.append(measured)
                if measured.mean < kept.mean:
                    kept = measured
                    _copy(trained, to=best)
            if progress:
                progress(step, options.steps)
        _copy(best, to=trained)
    return PolishReport(
        steps=options.steps,
        held_out=tuple(tuple(expert.held_out) for expert in experts),
        evaluations=tuple(evaluations),
        kept=kept,
    )


def split_samples(count: int, share: float, seed: int, expert: int) -> tuple[list[int], list[int]]:
    """The positions of an expert's samples that are trained on, and those that are held out, both ascending.

    Args:
        count: Number of samples; at least 2.
        share: The share to hold out, rounded; at least one sample is held out, and at least one is not.
        seed: The draw's.
        expert: The expert's position in the recipe.
    """
    held_out = min(max(1, round(share * count)), count - 1)
    order = random.Random(f"{seed} {expert}").sample(range(count), count)
    return sorted(order[held_out:]), sorted(order[:held_out])


class _Expert:
    """One expert's samples, what is held out of them, and the file of its predictions."""

    def __init__(self, name: str, samples: Sequence[Sample], file: Path, options: PolishOptions, index: int) -> None:
        if len(samples) < 2:
            raise CalibrationError(
                f"{name}: got {len(samples)} samples, need at least 2: one to train on, one to hold out"
            )
        self.name, self._samples, self._file = name, samples, file
        self._starts = _row_starts(samples)
        self._rows = np.load(file, mmap_mode="r")
        if self._rows.ndim != 2 or len(self._rows) != self._starts[-1]:
            raise CalibrationError(
                f"{file}: has shape {self._rows.shape}, need {self._starts[-1]} rows, one for each answer position of "
                f"{name}; write it from the same samples"
            )
        trained, self.held_out = split_samples(len(samples), options.held_out, options.seed, index)
        rng = random.Random(f"{options.seed} {index} batches")  # strings seed alike on every platform
        self.batches = _endless_batches(trained, options.batch, rng)

    def divergence(self, student: PreTrainedModel, chosen: Sequence[int]) -> tuple[Tensor, int]:
        """The sum of KL(expert ‖ student) over the answer positions of some samples, and how many these are."""
        log_probs = answer_log_probs(student, [self._samples[i] for i in chosen])
        rows = np.concatenate([self._rows[self._starts[i] : self._starts[i + 1]] for i in chosen])
        if rows.shape[1] != log_probs.shape[1]:
            raise CalibrationError(
                f"{self._file}: has {rows.shape[1]} tokens, but the student predicts {log_probs.shape[1]}; "
                "need one vocabulary"
            )
        expected = torch.from_numpy(rows).to(log_probs.device, torch.float32)
        total = functional.kl_div(log_probs, expected, reduction="sum", log_target=True)
        return total, len(rows)

    def held_out_kl(self, student: PreTrainedModel, batch: int) -> float:
        """The mean of KL(expert ‖ student) over the answer positions of the samples held out."""
        total, positions = 0.0, 0
        for begin in range(0, len(self.held_out), batch):
            part, count = self.divergence(student, self.held_out[begin : begin + batch])
            total += part.item()
            positions += count
        return total / positions


def answer_log_probs(model: PreTrainedModel, samples: Sequence[Sample]) -> Tensor:
    """log p at the answer positions of the samples, one after the other: [positions, vocabulary] in float32.

    Padding is on the right, where causal attention lets no answer see it, so that no mask is needed.
    """
    ids, _ = padded_inputs(samples)
    first = min(sample.answer_start for sample in samples) - 1
    lines = [line for line, sample in enumerate(samples) for _ in range(answer_length(sample))]
    places = [p - first for sample in samples for p in range(sample.answer_start - 1, len(sample.tokens) - 1)]
    logits = model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=ids.shape[1] - first).logits
    return logits[lines, places].float().log_softmax(-1)


def _measure(student: PreTrainedModel, experts: Sequence[_Expert], batch: int, step: int) -> HeldOutKL:
    with torch.no_grad():
        measured = HeldOutKL(step, tuple(expert.held_out_kl(student, batch) for expert in experts))
    for expert, value in zip(experts, measured.experts, strict=True):
        _check_finite(value, f"the held-out KL of {expert.name} after {step} steps")
    return measured


def _check_finite(value: float, what: str) -> None:
    if not math.isfinite(value):
        raise CalibrationError(
            f"{what} is {value}, need a finite number; the model or the file holds NaN, or learning_rate is too high"
        )


def answer_length(sample: Sample) -> int:
    return len(sample.tokens) - sample.answer_start


def _row_starts(samples: Sequence[Sample]) -> list[int]:
    """Where each sample's rows begin in a file of targets, and, last, how many rows there are."""
    return [0, *accumulate(answer_length(sample) for sample in samples)]


def batches_by_length(samples: Sequence[Sample], batch_tokens: int) -> Iterator[list[int]]:
    """Positions of samples of similar length, which saves padding; longest first, so that memory is short at once."""
    batch: list[int] = []
    for i in sorted(range(len(samples)), key=lambda i: -len(samples[i].tokens)):
        if batch and (len(batch) + 1) * len(samples[batch[0]].tokens) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    yield batch


def _endless_batches(items: Sequence[int], size: int, rng: random.Random) -> Iterator[list[int]]:
    """Batches from one shuffled order of the items after another; a batch may span two of them, or more."""
    order: list[int] = []
    while True:
        while len(order) < size:
            order += rng.sample(items, len(items))
        yield order[:size]
        order = order[size:]


def _rate(step: int, options: PolishOptions) -> float:
    """What the learning rate of step 0, 1, … is multiplied by: a linear rise, then a cosine that no step finds at 0."""
    if step < options.warmup:
        return (step + 1) / (options.warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - options.warmup) / max(1, options.steps - options.warmup)))


def _copy(sources: Sequence[Tensor], to: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for source, target in zip(sources, to, strict=True):
            target.copy_(source)


@contextmanager
def _no_dropout(student: PreTrainedModel, checkpointing: bool) -> Iterator[None]:
    """Put the student into evaluation mode, with activation checkpointing if asked for; afterwards it is off."""
    student.eval()
    if not checkpointing:
        yield
        return
    # Before transformers had these names, it called them gradient_checkpointing_enable and …_disable.
    enable = getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)
    disable = getattr(student, "activation_checkpointing_disable", student.gradient_checkpointing_disable)
    enable({"use_reentrant": False})
    # Layers are checkpointed in training mode alone. Their own flag does that; the modules in them, whose flags turn
    # dropout on, stay in evaluation mode.
    for module in student.modules():
        module.training = bool(getattr(module, "gradient_checkpointing", False))
    try:
        yield
    finally:
        disable()
        student.disable_input_require_grads()
        student.eval()
