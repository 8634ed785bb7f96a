"""Aligns the rows of embeddings and output heads to the output's vocabulary."""

from __future__ import annotations

import itertools
import threading
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
from resm_kernels.engine.token_tables import TokenTable, TokenTables
from resm_kernels.engine.tokenizer import OutputTokenizer
from resm_kernels.files import shortened
from resm_kernels.recipe import Recipe, RecipeError, TokenSource, canonical_folder, dotted

CHUNK: Final = 1 << 24
"""The most bytes of rows that are read at once."""

_GAP: Final = 1 << 16
"""Two rows are read at once, together with the bytes between them, if these are fewer than this number."""

_MEANS: Final = 1 << 8
"""The number of rows whose means are formed at once."""

RowSource = tuple[int, int]
"""A row of a model: the number of the model's tensor in `ModelTensors`, and the row."""


class Vocabulary:
    """Chooses for every model and every row of the output's embedding the row that is read for it.

    The rules are mergekit's. A token that a model has keeps the model's row. For a token that a model lacks, the first
    of these that exists is taken: the source that the recipe's `tokens` names, the base model's row, the mean of the
    rows of all models that have the token, zeros. `force` gives this row to the models that have the token, too. Rows
    that only pad the vocabulary are the mean of the model's other rows.
    """

    def __init__(self, recipe: Recipe, models: OpenedModels, tokenizer: OutputTokenizer, tables: TokenTables) -> None:
        entry = recipe.output_tokenizer
        assert entry is not None
        self.tokenizer, self._tables = tokenizer, tables
        self._models = models
        self._entries = entry.tokens
        self._base = recipe.base_model
        self._models_by_path = {canonical_folder(source.model): model for source, model in models.by_source.items()}
        self._rows_by_places: dict[tuple[Path, Path], list[int]] = {}
        self._models_by_path[canonical_folder(recipe.reference)] = models.reference

    def covers(self, name: str) -> bool:
        """Return True if the output's tensor of this name has rows of tokens."""
        return self._tables.table(name) is not None

    def inputs(self, tensor: OutputTensor) -> tuple[tuple[CheckpointReader, TensorInfo], ...]:
        """Return the inputs of one vocabulary tensor, each with a row for every token of the output."""
        table = self._tables.table(tensor.name)
        assert table is not None
        models = [self._models.by_source[source] for source in tensor.piece.sources]
        infos = [model.reader.tensors[name] for model, name in zip(models, tensor.inputs, strict=True)]
        tensors = ModelTensors([(model.reader, info) for model, info in zip(models, infos, strict=True)], table)
        model_rows = [self._rows_of(model, table, info) for model, info in zip(models, infos, strict=True)]
        base = next((i for i, s in enumerate(tensor.piece.sources) if self._base and s.is_model(self._base)), None)
        if tensor.piece.base is not None:
            base = 0
        defaults: dict[int, tuple[RowSource, ...]] = {}
        forced = set()
        for token, row in self.tokenizer.tokens.items():
            entry = self._entries.get(token)
            present = tuple((i, model_rows[i][row]) for i in range(len(models)) if model_rows[i][row] >= 0)
            if entry is not None and entry.force:
                forced.add(row)
            elif len(present) == len(models):
                continue
            if entry is not None and entry.source is not None:
                defaults[row] = self._named_source(entry.source, token, tensor, tensors)
            else:
                base_row = tuple(source for source in present if source[0] == base)
                defaults[row] = base_row or present
        return tuple(self._input(tensors, i, model_rows[i], defaults, forced) for i in range(len(models)))

    def _rows_of(self, model: Model, table: TokenTable, info: TensorInfo) -> list[int]:
        """Return for each row of the output's tensor the row of the model's that it is, −1 for a token it lacks."""
        rows, count = self._model_rows(model), table.tokens(info)
        if table.first_stands_in and max(rows) >= count:
            rows = [row if row < count else 0 for row in rows]
        return [*rows, *range(count, count + table.further)]

    def _model_rows(self, model: Model) -> list[int]:
        """Return for each row of the output the model's row of the same token, −1 where the model has no such token."""
        if model.places not in self._rows_by_places:
            known = self.tokenizer.known[model.places]
            rows = [-1] * self.tokenizer.rows
            for token, row in self.tokenizer.tokens.items():
                rows[row] = known.get(token, -1)
            self._rows_by_places[model.places] = rows
        return self._rows_by_places[model.places]

    def _named_source(
        self, source: TokenSource, token: str, tensor: OutputTensor, tensors: ModelTensors
    ) -> tuple[RowSource, ...]:
        """Return the row that the recipe names for a token; none for zeros."""
        where = dotted(("tokenizer", "tokens", token, "source"))
        if source.model is None:
            return ()
        model = self._models_by_path.get(canonical_folder(source.model))
        if model is None:
            raise RecipeError(f"{where}: got {shortened(source.model)}, need one of the recipe's models")
        info = model.reader.tensors.get(tensor.inputs[0])
        if info is None:
            raise RecipeError(f"{where}: {model.folder} has no tensor {tensor.inputs[0]!r}; name another model")
        row = source.token_id
        if row is None:
            row = self.tokenizer.known[model.places].get(source.token or token)
        if row is None:
            raise RecipeError(f"{where}: {model.folder} has no token {shortened(source.token or token)}; name another")
        count = tensors.table.tokens(info)
        if row >= count and not tensors.table.first_stands_in:
            raise RecipeError(f"{where}: got token_id {row}, but {model.folder} has {count} rows; need a lower one")
        return ((tensors.number(model.reader, info), row if row < count else 0),)

    def _input(
        self,
        tensors: ModelTensors,
        i: int,
        model_rows: list[int],
        defaults: Mapping[int, tuple[RowSource, ...]],
        forced: set[int],
    ) -> tuple[CheckpointReader, TensorInfo]:
        """Return the aligned tensor of model `i`, or its tensor as it is if no row has to be changed."""
        reader, info = tensors.tensors[i]
        if not forced and info.shape[0] == len(model_rows) and model_rows == list(range(len(model_rows))):
            return reader, reader.tensors[info.name]
        foreign = {row: sources for row, sources in defaults.items() if row in forced or model_rows[row] < 0}
        remaining_rows = [-1 if row in foreign else model_row for row, model_row in enumerate(model_rows)]
        if max(remaining_rows) >= info.shape[0]:
            raise MergeError(
                f"{reader.folder}: tensor {info.name!r} has {info.shape[0]} rows, but its tokenizer and config.json "
                f"have a token with row {max(remaining_rows)}; need a tokenizer that fits its model"
            )
        aligned = AlignedReader(tensors, i, remaining_rows, foreign)
        return aligned, aligned.tensors[info.name]


class ModelTensors:
    """One vocabulary tensor in several models.

    Attributes:
        tensors: Each model's reader, and the description of the tensor without the dimensions before its rows.
        table: How the tensor holds rows of tokens.
    """

    def __init__(self, tensors: Sequence[tuple[CheckpointReader, TensorInfo]], table: TokenTable) -> None:
        self.table = table
        self.tensors = [(reader, self._without_axes(info)) for reader, info in tensors]

    def _without_axes(self, info: TensorInfo) -> TensorInfo:
        return replace(info, shape=info.shape[self.table.axis :])

    def number(self, reader: CheckpointReader, info: TensorInfo) -> int:
        """Return the number of a model's tensor, and add the tensor if it is new."""
        for i, (known, _) in enumerate(self.tensors):
            if known is reader:
                return i
        self.tensors.append((reader, self._without_axes(info)))
        return len(self.tensors) - 1

    def add(
        self, i: int, rows: Tensor, targets: Tensor, out: Tensor, formed: dict[int, Tensor], *, first_time: bool
    ) -> None:
        """Add rows of tensor `i` to the rows `targets` of `out`.

        Rows are read in the order of the file, together with the bytes between two that are close to each other.

        Args:
            i: The number of the tensor.
            rows: The rows to read.
            targets: The row of `out` that each is added to; no row occurs twice.
            out: A tensor of the same dtype or a wider one.
            formed: Tensors that can only be read whole, by number; they are stored for later calls.
            first_time: True if all of `out` is zero.
        """
        reader, info = self.tensors[i]
        if not reader.has_parts(info.name):
            if i not in formed:
                formed[i] = reader.read(info.name).view(info.shape)
            out.index_add_(0, targets, formed[i][rows].to(out.dtype))
            return
        nbytes = info.nbytes // info.shape[0]
        rows, order = rows.sort(stable=True)
        targets = targets[order]
        for first, last in _pieces(rows, _GAP // max(nbytes, 1) + 1, max(CHUNK // max(nbytes, 1), 1)):
            start, end = int(rows[first]), int(rows[last - 1]) + 1
            target, count = int(targets[first]), last - first
            contiguous = end - start == count and bool((targets[first:last] - rows[first:last] == target - start).all())
            if contiguous and first_time and out.dtype == info.dtype:
                reader.read_into(info.rows(start, end), out[target : target + count])
                continue
            piece = reader.read_info(info.rows(start, end))
            if contiguous:
                out[target : target + count] += piece
            else:
                out.index_add_(0, targets[first:last], piece[rows[first:last] - start].to(out.dtype))


class AlignedReader(CheckpointReader):
    """One vocabulary tensor of a model with the rows of another vocabulary. It opens no files itself.

    The tensor has the model's dtype if every row is zero or a row of the model. With rows of other models, means or
    padding it is in fp32, or in float64 if one of the models is, because it is not rounded before the merge.

    Args:
        tensors: The models' tensors.
        i: The number of this model's tensor.
        model_rows: For each row of the result the row of this model that it is, or −1.
        foreign: For rows of the result that are not this model's, the rows whose mean they are; no rows for zeros. A
            row that neither argument describes is padding: the mean of all rows that are not padding.
    """

    def __init__(
        self, tensors: ModelTensors, i: int, model_rows: Sequence[int], foreign: Mapping[int, tuple[RowSource, ...]]
    ) -> None:
        reader, info = tensors.tensors[i]
        self.folder = reader.folder
        self._model_tensors = tensors
        self._lock = threading.Lock()
        self._mean_row: Tensor | None = None
        self._padding = torch.tensor(
            [row for row, source in enumerate(model_rows) if source < 0 and row not in foreign]
        )
        means = {row: len(sources) for row, sources in foreign.items() if len(sources) > 1}
        self._means, self._counts = torch.tensor(list(means)), torch.tensor(list(means.values()))
        model_moves = [(i, model_row, row) for row, model_row in enumerate(model_rows) if model_row >= 0]
        foreign_moves = [(j, source_row, row) for row, sources in foreign.items() for j, source_row in sources]
        # Foreign rows are added in one order for all models, so that a mean has the same bits in each.
        self._moves = [*_by_tensor(model_moves), *_by_tensor(foreign_moves)]
        involved = {tensors.tensors[j][1].dtype for j in {i, *(j for j, *_ in self._moves)}}
        wide = torch.float64 if torch.float64 in involved else torch.float32
        dtype = wide if len(self._padding) or any(foreign.values()) else info.dtype
        shape = (len(model_rows), *info.shape[1:])
        nbytes = dtype.itemsize * len(model_rows) * (info.numel // info.shape[0])
        self._rows = replace(info, dtype=dtype, shape=shape, nbytes=nbytes)
        whole = replace(self._rows, shape=(1,) * tensors.table.axis + shape)
        self.tensors = MappingProxyType({info.name: whole})

    @property
    def workspace(self) -> int:
        """Bytes that reading takes beyond the result: two pieces, their rows in a wider dtype, tensors read whole.

        The models' readers may take more.
        """
        whole = [info.nbytes for reader, info in self._model_tensors.tensors if not reader.has_parts(info.name)]
        return 6 * CHUNK + 2 * sum(whole) + max(reader.workspace for reader, _ in self._model_tensors.tensors)

    def has_parts(self, name: str) -> bool:
        """Return True if the rows of all models can be read without reading a tensor whole."""
        return all(reader.has_parts(info.name) for reader, info in self._model_tensors.tensors)

    def is_stored(self, name: str) -> bool:
        """Return False: rows come from several places."""
        return False

    def read_into(self, info: TensorInfo, buffer: Tensor) -> None:
        """Fill `buffer` with the aligned tensor, or with the part of it that `info` describes."""
        whole = self._rows
        row = whole.numel // whole.shape[0]
        start = (info.offset - whole.offset) // info.dtype.itemsize
        out = buffer.view(-1).view(torch.uint8).view(info.dtype)
        first, last = start // row, -(-(start + info.numel) // row)
        if (first * row, last * row) == (start, start + info.numel):
            self._read_rows(first, out.view(last - first, *whole.shape[1:]), {})
            return
        for i, rows in self._pieces_of(whole, first, last, {}):
            flat, begin = rows.view(-1), i * row
            inside = flat[max(start - begin, 0) : start + info.numel - begin]
            at = max(begin - start, 0)
            out[at : at + len(inside)] = inside

    def _pieces_of(
        self, info: TensorInfo, first: int, last: int, formed: dict[int, Tensor], *, padded: bool = True
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield the rows [first, last) of the aligned tensor in pieces, each with the number of its first row."""
        step = max(CHUNK // max(info.nbytes // info.shape[0], 1), 1)
        for i in range(first, last, step):
            rows = torch.empty((min(step, last - i), *info.shape[1:]), dtype=info.dtype)
            self._read_rows(i, rows, formed, padded=padded)
            yield i, rows

    def _read_rows(self, first: int, out: Tensor, formed: dict[int, Tensor], *, padded: bool = True) -> None:
        """Fill `out` with the aligned tensor's rows from `first` on; without `padded`, rows of padding are zero."""
        out.zero_()
        first_time = True
        for i, rows, targets in self._moves:
            inside = _within(targets, first, len(out))
            if bool(inside.any()):
                model_rows, to = rows[inside], targets[inside] - first
                self._model_tensors.add(i, model_rows, to, out, formed, first_time=first_time)
                first_time = False
        inside = _within(self._means, first, len(out))
        if bool(inside.any()):
            counts = self._counts[inside].to(out.dtype).view(-1, *[1] * (out.ndim - 1))
            for part, count in zip((self._means[inside] - first).split(_MEANS), counts.split(_MEANS), strict=True):
                out[part] = out[part] / count
        padding = self._padding[_within(self._padding, first, len(out))] - first
        if padded and len(padding):
            out[padding] = self._padding_row(formed)

    def _padding_row(self, formed: dict[int, Tensor]) -> Tensor:
        """Return the mean of all rows that are not padding; it is computed once."""
        with self._lock:
            if self._mean_row is None:
                info = self._rows
                total = torch.zeros(info.shape[1:], dtype=torch.float64)
                for _, rows in self._pieces_of(info, 0, info.shape[0], formed, padded=False):
                    total += rows.sum(0, dtype=torch.float64)
                self._mean_row = (total / (info.shape[0] - len(self._padding))).to(info.dtype)
            return self._mean_row


def _within(rows: Tensor, first: int, count: int) -> Tensor:
    """Return which of these rows are among the `count` rows from `first` on."""
    return (rows >= first) & (rows < first + count)


def _by_tensor(moves: list[tuple[int, int, int]]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Group single moves (tensor, row, target): yield each tensor with all its rows and their targets."""
    numbers, rows, targets = torch.tensor(moves, dtype=torch.int64).reshape(-1, 3).unbind(1)
    for i in numbers.unique().tolist():
        yield i, rows[numbers == i], targets[numbers == i]


def _pieces(rows: Tensor, gap: int, longest: int) -> Iterator[tuple[int, int]]:
    """Divide sorted rows into pieces to read at once; yield [first, last) of each.

    Two neighbours in a piece are less than `gap` apart, and a piece spans fewer than `longest` rows.
    """
    edges = [0, *(torch.nonzero(rows.diff() >= gap).flatten() + 1).tolist(), len(rows)]
    for first, last in itertools.pairwise(edges):
        while first < last:
            end = int(torch.searchsorted(rows[first:last], rows[first] + longest)) + first
            yield first, end
            first = end
