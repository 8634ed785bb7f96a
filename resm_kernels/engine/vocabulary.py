"""Embeddings and heads aligned to the output's vocabulary: read row by row, each token's from where it is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from resm_kernels.checkpoint import CheckpointReader, TensorInfo
from resm_kernels.engine.layout import OutputTensor
from resm_kernels.engine.models import MergeError, Model, OpenedModels
from resm_kernels.engine.tokenizer import OutputTokenizer
from resm_kernels.lora import AdapterReader
from resm_kernels.recipe import Recipe, RecipeError, TokenSource, same_place

CHUNK: Final = 1 << 24
"""Bytes of rows that are read at a time."""

_GAP: Final = 1 << 16
"""Bytes between two rows that are rather read than skipped."""

_MEANS: Final = 1 << 8
"""Means that are formed at a time."""

Place = tuple[int, int]
"""A row of a model: its number among `_Rows`, and the row."""


class Vocabulary:
    """Says for every model which row of its embedding becomes which of the output's.

    A token that a model has keeps that row. One that it lacks takes, in this order, what the recipe's `tokens` says,
    the base model's row, the only other model's, the mean of all that have it, zeros. `force` gives all models what
    those without the token would take. Rows that only pad the vocabulary are the mean of the model's other rows
    (mergekit's rules).
    """

    def __init__(self, recipe: Recipe, models: OpenedModels, tokenizer: OutputTokenizer) -> None:
        entry = recipe.output_tokenizer
        assert entry is not None
        self.tokenizer = tokenizer
        self._models = models
        self._entries = entry.tokens
        self._base = recipe.base_model
        self._named = {same_place(source.model): model for source, model in models.by_source.items()}
        self._rows_of: dict[Path, list[int]] = {}
        self._named[same_place(recipe.reference)] = models.reference

    def inputs(self, tensor: OutputTensor) -> tuple[tuple[CheckpointReader, TensorInfo], ...]:
        """The inputs of one vocabulary tensor, all with a row for every token of the output."""
        models = [self._models.by_source[source] for source in tensor.piece.sources]
        rows = _Rows([(m.reader, m.reader.tensors[name]) for m, name in zip(models, tensor.inputs, strict=True)])
        own = [self._own(model) for model in models]
        base = next((i for i, s in enumerate(tensor.piece.sources) if self._base and s.is_model(self._base)), None)
        if tensor.piece.base is not None:
            base = 0
        defaults: dict[int, tuple[Place, ...]] = {}
        forced = set()
        for token, row in self.tokenizer.tokens.items():
            entry = self._entries.get(token)
            present = tuple((i, own[i][row]) for i in range(len(models)) if own[i][row] >= 0)
            if entry is not None and entry.force:
                forced.add(row)
            elif len(present) == len(models):
                continue
            if entry is not None and entry.source is not None:
                defaults[row] = self._from(entry.source, token, tensor, rows)
            else:
                of_base = tuple(place for place in present if place[0] == base)
                defaults[row] = of_base or present
        return tuple(self._input(rows, i, own[i], defaults, forced) for i in range(len(models)))

    def _own(self, model: Model) -> list[int]:
        """For each row of the output the model's own row, −1 where it has none."""
        if model.base_folder not in self._rows_of:
            known = self.tokenizer.known[model.base_folder]
            own = [-1] * self.tokenizer.rows
            for token, row in self.tokenizer.tokens.items():
                own[row] = known.get(token, -1)
            self._rows_of[model.base_folder] = own
        return self._rows_of[model.base_folder]

    def _from(self, source: TokenSource, token: str, tensor: OutputTensor, rows: _Rows) -> tuple[Place, ...]:
        """The row that the recipe names for a token; none for zeros."""
        where = f"tokenizer.tokens.{token}.source"
        if source.model is None:
            return ()
        model = self._named.get(same_place(source.model))
        if model is None:
            raise RecipeError(f"{where}: got {source.model!r}, need one of the recipe's models")
        info = model.reader.tensors.get(tensor.inputs[0])
        if info is None:
            raise RecipeError(f"{where}: {model.folder} has no tensor {tensor.inputs[0]!r}; name another model")
        row = source.token_id
        if row is None:
            row = self.tokenizer.known[model.base_folder].get(source.token or token)
        if row is None:
            raise RecipeError(f"{where}: {model.folder} has no token {source.token or token!r}")
        if row >= info.shape[0]:
            raise RecipeError(f"{where}: got token_id {row}, but {model.folder} has {info.shape[0]} rows")
        return ((rows.number(model.reader, info), row),)

    def _input(
        self, rows: _Rows, i: int, own: list[int], defaults: Mapping[int, tuple[Place, ...]], forced: set[int]
    ) -> tuple[CheckpointReader, TensorInfo]:
        reader, info = rows.tensors[i]
        if not forced and info.shape[0] == len(own) and own == list(range(len(own))):
            return reader, info
        foreign = {row: places for row, places in defaults.items() if row in forced or own[row] < 0}
        kept = [-1 if row in foreign else old for row, old in enumerate(own)]
        if max(kept) >= info.shape[0]:
            raise MergeError(
                f"{reader.folder}: tensor {info.name!r} has {info.shape[0]} rows, but its tokenizer and config.json "
                f"have a token with row {max(kept)}"
            )
        aligned = AlignedReader(rows, i, kept, foreign)
        return aligned, aligned.tensors[info.name]


class _Rows:
    """Rows of one vocabulary tensor in several models."""

    def __init__(self, tensors: Sequence[tuple[CheckpointReader, TensorInfo]]) -> None:
        self.tensors = list(tensors)

    def number(self, reader: CheckpointReader, info: TensorInfo) -> int:
        """The number of a model's tensor, which is added if it is new."""
        for i, (known, _) in enumerate(self.tensors):
            if known is reader:
                return i
        self.tensors.append((reader, info))
        return len(self.tensors) - 1

    def add(
        self, i: int, rows: Tensor, to: Tensor, out: Tensor, formed: dict[int, Tensor], *, first_time: bool
    ) -> None:
        """Add rows of tensor `i` to the rows `to` of `out`, which has its dtype or a wider one; `to` has no row twice.

        The first time all of `out` is zero.

        They are read in the order in which they lie in the file, with what is between two that are close together.
        `formed` keeps tensors that an adapter forms, which can only be read whole, for the next call.
        """
        reader, info = self.tensors[i]
        if isinstance(reader, AdapterReader) and reader.is_adapted(info.name):
            if i not in formed:
                formed[i] = reader.read(info.name)
            out.index_add_(0, to, formed[i][rows].to(out.dtype))
            return
        nbytes = info.nbytes // info.shape[0]
        rows, order = rows.sort(stable=True)
        to = to[order]
        for first, last in _pieces(rows, _GAP // max(nbytes, 1) + 1, max(CHUNK // max(nbytes, 1), 1)):
            start, end = int(rows[first]), int(rows[last - 1]) + 1
            shape = (end - start, *info.shape[1:])
            part = replace(info, shape=shape, offset=info.offset + start * nbytes, nbytes=(end - start) * nbytes)
            here = int(to[first])
            together = end - start == last - first and bool((to[first:last] - rows[first:last] == here - start).all())
            if together and first_time and out.dtype == info.dtype:
                reader.read_into(part, out[here : here + last - first])
                continue
            piece = torch.empty(shape, dtype=info.dtype)
            reader.read_into(part, piece)
            if together:
                out[here : here + last - first] += piece
            else:
                out.index_add_(0, to[first:last], piece[rows[first:last] - start].to(out.dtype))


class AlignedReader(CheckpointReader):
    """One vocabulary tensor of a model with the rows of another vocabulary. It opens no files of its own.

    The tensor keeps its dtype if all its rows are the model's own or zeros; rows of other models, means and padding
    are in fp32 (float64 if a model is), as they are not rounded before the merge.

    Args:
        rows: The models' tensors.
        i: Which of them is this model's.
        kept: For each row the model's own, or −1.
        foreign: For rows that are not its own where they are from: the mean of these places, zeros for none. Rows in
            neither are padding: the mean of all rows that are not.
    """

    def __init__(self, rows: _Rows, i: int, kept: Sequence[int], foreign: Mapping[int, tuple[Place, ...]]) -> None:
        reader, info = rows.tensors[i]
        self.folder = reader.folder
        self._rows = rows
        self._padding = torch.tensor([row for row, old in enumerate(kept) if old < 0 and row not in foreign])
        means = {row: len(places) for row, places in foreign.items() if len(places) > 1}
        self._means, self._counts = torch.tensor(list(means)), torch.tensor(list(means.values()))
        own = [(i, old, row) for row, old in enumerate(kept) if old >= 0]
        others = [(j, place, row) for row, places in foreign.items() for j, place in places]
        # Others in one order for all models, so that a mean has the same bits in each.
        self._moves = [*_by_tensor(own), *_by_tensor(others)]
        involved = {rows.tensors[j][1].dtype for j in {i, *(j for j, *_ in self._moves)}}
        wide = torch.float64 if torch.float64 in involved else torch.float32
        dtype = wide if len(self._padding) or any(foreign.values()) else info.dtype
        shape = (len(kept), *info.shape[1:])
        nbytes = dtype.itemsize * len(kept) * (info.numel // info.shape[0])
        self.tensors = MappingProxyType({info.name: replace(info, dtype=dtype, shape=shape, nbytes=nbytes)})

    @property
    def workspace(self) -> int:
        """Bytes that reading takes beside the result: a piece, its rows in a wider dtype, and what adapters form."""
        adapted = [
            info.nbytes
            for reader, info in self._rows.tensors
            if isinstance(reader, AdapterReader) and reader.is_adapted(info.name)
        ]
        return 5 * CHUNK + 2 * sum(adapted)

    def read_into(self, info: TensorInfo, buffer: Tensor) -> None:
        """Fill `buffer` with the aligned tensor."""
        out = buffer.view(-1).view(torch.uint8).view(info.dtype).view(info.shape).zero_()
        formed: dict[int, Tensor] = {}
        for n, (i, rows, to) in enumerate(self._moves):
            self._rows.add(i, rows, to, out, formed, first_time=n == 0)
        if len(self._means):
            counts = self._counts.to(out.dtype).view(-1, *[1] * (out.ndim - 1))
            for part, count in zip(self._means.split(_MEANS), counts.split(_MEANS), strict=True):
                out[part] = out[part] / count
        if len(self._padding):
            step = max(CHUNK // max(info.nbytes // info.shape[0], 1), 1)
            total = torch.zeros(info.shape[1:], dtype=torch.float64)
            for part in out.split(step):
                total += part.sum(0, dtype=torch.float64)
            out[self._padding] = (total / (len(out) - len(self._padding))).to(info.dtype)


def _by_tensor(moves: list[tuple[int, int, int]]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(tensor, row, to) one by one → each tensor with all its rows and where they go."""
    numbers, rows, to = torch.tensor(moves, dtype=torch.int64).reshape(-1, 3).unbind(1)
    for i in numbers.unique().tolist():
        yield i, rows[numbers == i], to[numbers == i]


def _pieces(rows: Tensor, gap: int, longest: int) -> Iterator[tuple[int, int]]:
    """[first, last) of stretches of sorted rows with less than `gap` between two, and less than `longest` in all."""
    edges = [0, *(torch.nonzero(rows.diff() >= gap).flatten() + 1).tolist(), len(rows)]
    for first, last in itertools.pairwise(edges):
        while first < last:
            end = int(torch.searchsorted(rows[first:last], rows[first] + longest)) + first
            yield first, end
            first = end
