"""Activations of all prompts, kept in files: a batch of prompts is in memory at a time, never all of them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from resm_kernels.calibrate.errors import CalibrationError
from resm_kernels.calibrate.prompts import Sample
from resm_kernels.checkpoint.durable import sync


@dataclass(frozen=True)
class Batch:
    """Samples that run together, padded on the right: a decoder is causal, so no position sees the padding.

    Attributes:
        tokens: (batch, length) int64.
        positions: The positions of real tokens in the flattened batch, in order, (n,).
        weights: √u_p of each of these positions, (n,) fp32: u_p is proportional to 1, or to the answer weight where the
            next token belongs to the answer; over all batches Σ u_p = 1.
        first: Number of real tokens in the batches before this one.
    """

    tokens: Tensor
    positions: Tensor
    weights: Tensor
    first: int

    @property
    def last(self) -> int:
        return self.first + len(self.positions)

    def pack(self, x: Tensor) -> Tensor:
        """The rows of real tokens of x, (batch, length, width) → (n, width)."""
        return x.reshape(-1, x.shape[-1])[self.positions.to(x.device)]

    def unpack(self, rows: Tensor) -> Tensor:
        """The reverse of `pack`, with zeros for the padding."""
        count, length = self.tokens.shape
        x = rows.new_zeros(count * length, rows.shape[1])
        x[self.positions.to(rows.device)] = rows
        return x.view(count, length, -1)


def groups_by_length(samples: Sequence[Sample], batch_tokens: int) -> list[list[Sample]]:
    """Groups of at most `batch_tokens` input tokens, padding included (or one sample), the shortest samples first."""
    groups: list[list[Sample]] = []
    for i in sorted(range(len(samples)), key=lambda i: (len(samples[i].tokens), i)):
        if not groups or (len(groups[-1]) + 1) * (len(samples[i].tokens) - 1) > batch_tokens:
            groups.append([])
        groups[-1].append(samples[i])
    return groups


def padded_inputs(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """What a model reads of the samples, (batch, length) padded on the right, and which positions are not padding.

    A decoder is causal, so that no position sees the padding. A sample's last token is left out: nothing is predicted
    from it.
    """
    lengths = torch.tensor([len(sample.tokens) - 1 for sample in samples])
    width = int(lengths.max())
    tokens = torch.tensor([[*sample.tokens[:-1], *[0] * (width + 1 - len(sample.tokens))] for sample in samples])
    return tokens, torch.arange(width) < lengths[:, None]


def make_batches(samples: Sequence[Sample], answer_weight: float, batch_tokens: int) -> list[Batch]:
    """Batches of samples of similar length; see `groups_by_length` and `padded_inputs`.

    Args:
        samples: One expert's samples.
        answer_weight: How much more a position counts that predicts a token of the answer.
        batch_tokens: Padding counts too.
    """
    answers = sum(len(sample.tokens) - sample.answer_start for sample in samples)
    total = sum(len(sample.tokens) - 1 for sample in samples) + (answer_weight - 1) * answers
    batches, first = [], 0
    for group in groups_by_length(samples, batch_tokens):
        tokens, real = padded_inputs(group)
        answer = torch.arange(tokens.shape[1]) >= torch.tensor([s.answer_start - 1 for s in group])[:, None]
        positions = real.flatten().nonzero().squeeze(1)
        weights = torch.where(answer, math.sqrt(answer_weight / total), math.sqrt(1 / total)).flatten()[positions]
        batches.append(Batch(tokens, positions, weights, first))
        first = batches[-1].last
    return batches


class RowFile:
    """A matrix of fp32 rows in a file, of which a process holds only what it reads or writes at the moment.

    Args:
        file: Its path.
        shape: Rows and width.
        new: Whether to make the file, with zeros, in place of one that may be there. Otherwise it has to be there.

    Raises:
        CalibrationError: The file is not there or has another size, or cannot be read or written.
    """

    def __init__(self, file: Path, shape: tuple[int, int], *, new: bool = False) -> None:
        self.file, self.shape = file, shape
        size = 4 * shape[0] * shape[1]
        with _errors_named(file):
            if new:
                with open(file, "wb") as stream:
                    stream.truncate(size)
            found = file.stat().st_size
        if found != size:
            raise CalibrationError(f"{file}: has {found} bytes, need {size}; pass --restart to begin anew")

    def read(self, first: int, last: int) -> Tensor:
        """Rows first to last, in new memory."""
        count, offset = (last - first) * self.shape[1], 4 * first * self.shape[1]
        with _errors_named(self.file):
            rows = np.fromfile(self.file, np.float32, count, offset=offset)
        return torch.from_numpy(rows.reshape(last - first, self.shape[1]))

    def write(self, first: int, rows: Tensor) -> None:
        """Replace rows from `first` on."""
        with _errors_named(self.file), open(self.file, "r+b") as stream:
            stream.seek(4 * first * self.shape[1])
            # Not by `tofile`, whose errors do not say that the disk is full.
            stream.write(rows.detach().float().cpu().contiguous().numpy().data)

    def sync(self) -> None:
        """Return when the rows are on disk, so that they are still there after a power failure."""
        with _errors_named(self.file):
            sync(self.file)

    def remove(self) -> None:
        """Delete the file."""
        self.file.unlink()


@contextlib.contextmanager
def _errors_named(file: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise CalibrationError(f"{file}: is missing; pass --restart to begin anew") from error
    except OSError as error:
        raise CalibrationError(f"{file}: cannot be read or written: {error.strerror or error}") from error
