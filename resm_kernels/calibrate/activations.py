"""Activations of all prompts, kept in files: a batch of prompts is in memory at a time, never a layer of all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from resm_kernels.calibrate.prompts import Sample


@dataclass(frozen=True)
class Batch:
    """Samples that run together, padded on the right: a decoder is causal, so no position sees the padding.

    Attributes:
        tokens: (batch, length) int64.
        positions: The positions of real tokens in the flattened batch, in order, (n,).
        weights: √u of each of these positions, (n,) fp32: u is 1, or the answer weight where the next token belongs to
            the answer.
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
    """
    order = sorted(range(len(samples)), key=lambda i: (len(samples[i].tokens), i))
    groups: list[list[Sample]] = []
    for i in order:
        length = len(samples[i].tokens) - 1
        if not groups or (len(groups[-1]) + 1) * length > batch_tokens:
            groups.append([])
        groups[-1].append(samples[i])
    batches, first = [], 0
    for group in groups:
        lengths = torch.tensor([len(sample.tokens) - 1 for sample in group])
        width = int(lengths.max())
        tokens = torch.tensor([[*sample.tokens[:-1], *[0] * (width - len(sample.tokens) + 1)] for sample in group])
        place = torch.arange(width)
        answer = place >= torch.tensor([sample.answer_start - 1 for sample in group])[:, None]
        positions = (place < lengths[:, None]).flatten().nonzero().squeeze(1)
        weights = torch.where(answer, math.sqrt(answer_weight), 1.0).flatten()[positions]
        batches.append(Batch(tokens, positions, weights, first))
        first = batches[-1].last
    return batches


class RowFile:
    """A matrix of fp32 rows in a file, of which a process holds only what it reads or writes at the moment.

    Args:
        file: Its path. The file is made, with zeros, if it is not there or has another size.
        shape: Rows and width.
    """

    def __init__(self, file: Path, shape: tuple[int, int]) -> None:
        self.file, self.shape = file, shape
        size = 4 * shape[0] * shape[1]
        if not file.is_file() or file.stat().st_size != size:
            with open(file, "wb") as stream:
                stream.truncate(size)

    def read(self, first: int, last: int) -> Tensor:
        """Rows first to last, in new memory."""
        rows = np.fromfile(
            self.file, np.float32, (last - first) * self.shape[1], offset=4 * first * self.shape[1]
        ).reshape(last - first, self.shape[1])
        return torch.from_numpy(rows)

    def write(self, first: int, rows: Tensor) -> None:
        """Replace rows from `first` on."""
        with open(self.file, "r+b") as stream:
            stream.seek(4 * first * self.shape[1])
            rows.detach().float().cpu().contiguous().numpy().tofile(stream)
