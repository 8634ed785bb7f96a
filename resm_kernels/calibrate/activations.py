"""Activations of all prompts, kept in files: a batch of prompts is in memory at a time, never all of them."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from resm_kernels.calibrate.errors import CalibrationError
from resm_kernels.calibrate.prompts import Sample


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


def make_batches(samples: Sequence[Sample], answer_weight: float, batch_tokens: int) -> list[Batch]:
    """Batches of at most `batch_tokens` tokens (or one sample), each of samples of similar length.

    A sample's last token is left out, because nothing is predicted from it.

    Args:
        samples: One expert's samples.
        answer_weight: How much more a position counts that predicts a token of the answer.
        batch_tokens: Padding counts too.
    """
    order = sorted(range(len(samples)), key=lambda i: (len(samples[i].tokens), i))
    groups: list[list[Sample]] = []
    for i in order:
        length = len(samples[i].tokens) - 1
        if not groups or (len(groups[-1]) + 1) * length > batch_tokens:
            groups.append([])
        groups[-1].append(samples[i])
    answers = sum(len(sample.tokens) - sample.answer_start for sample in samples)
    total = sum(len(sample.tokens) - 1 for sample in samples) + (answer_weight - 1) * answers
    batches, first = [], 0
    for group in groups:
        lengths = torch.tensor([len(sample.tokens) - 1 for sample in group])
        width = int(lengths.max())
        tokens = torch.tensor([[*sample.tokens[:-1], *[0] * (width - len(sample.tokens) + 1)] for sample in group])
        place = torch.arange(width)
        answer = place >= torch.tensor([sample.answer_start - 1 for sample in group])[:, None]
        positions = (place < lengths[:, None]).flatten().nonzero().squeeze(1)
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
        with _errors_named(self.file), open(self.file, "rb") as stream:
            os.fsync(stream.fileno())

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
