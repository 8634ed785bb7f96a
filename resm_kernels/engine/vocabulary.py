"""Embeddings and heads aligned to the output's vocabulary: read row by row, each token's from where it is."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
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
"""Bytes of rows that are read at a time where their dtype has to change."""

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
        self._named = {same_place(source.model): model for source, model in models.of.items()}
        self._named[same_place(recipe.reference)] = models.reference

    def inputs(self, tensor: OutputTensor) -> tuple[tuple[CheckpointReader, TensorInfo], ...]:
        """The inputs of one vocabulary tensor, all with a row for every token of the output."""
        models = [self._models.of[source] for source in tensor.piece.sources]
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
        known = self.tokenizer.known[model.base_folder]
        own = [-1] * self.tokenizer.rows
        for token, row in self.tokenizer.tokens.items():
            own[row] = known.get(token, -1)
        return own

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

    def read(self, i: int, first: int, last: int, out: Tensor, formed: dict[int, Tensor]) -> None:
        """Fill `out` with rows [first, last) of tensor `i`, in its own dtype or a wider one.

        `formed` keeps tensors that an adapter forms, which can only be read whole, for the next call.
        """
        reader, info = self.tensors[i]
        if isinstance(reader, AdapterReader) and reader.is_adapted(info.name):
            if i not in formed:
                formed[i] = reader.read(info.name)
            out.copy_(formed[i][first:last])
            return
        row = info.nbytes // info.shape[0]
        step = last - first if out.dtype == info.dtype else max(CHUNK // max(row, 1), 1)
        for start in range(first, last, step):
            end = min(start + step, last)
            shape = (end - start, *info.shape[1:])
            part = replace(info, shape=shape, offset=info.offset + start * row, nbytes=(end - start) * row)
            target = out[start - first : end - first]
            if out.dtype == info.dtype:
                reader.read_into(part, target)
            else:
                piece = torch.empty(shape, dtype=info.dtype)
                reader.read_into(part, piece)
                target.copy_(piece)


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
        self._rows, self._number, self._foreign = rows, i, foreign
        self._kept = torch.tensor(kept, dtype=torch.int64)
        self._padding = [row for row, old in enumerate(kept) if old < 0 and row not in foreign]
        involved = {info.dtype, *(rows.tensors[j][1].dtype for places in foreign.values() for j, _ in places)}
        wide = torch.float64 if torch.float64 in involved else torch.float32
        dtype = wide if self._padding or any(foreign.values()) else info.dtype
        shape = (len(kept), *info.shape[1:])
        nbytes = dtype.itemsize * len(kept) * (info.numel // info.shape[0])
        self.tensors = MappingProxyType({info.name: replace(info, dtype=dtype, shape=shape, nbytes=nbytes)})

    @property
    def workspace(self) -> int:
        """Bytes that reading takes beside the result."""
        adapted = [
            info.nbytes
            for reader, info in self._rows.tensors
            if isinstance(reader, AdapterReader) and reader.is_adapted(info.name)
        ]
        return 2 * CHUNK + sum(adapted)

    def read_into(self, info: TensorInfo, buffer: Tensor) -> None:
        """Fill `buffer` with the aligned tensor."""
        out = buffer.view(-1).view(torch.uint8).view(info.dtype).view(info.shape)
        formed: dict[int, Tensor] = {}
        for first, last in _runs(self._kept):
            start = int(self._kept[first])
            self._rows.read(self._number, start, start + last - first, out[first:last], formed)
        for row, places in self._foreign.items():
            total = torch.zeros(info.shape[1:], dtype=info.dtype)
            piece = torch.empty((1, *info.shape[1:]), dtype=info.dtype)
            for i, place in places:
                self._rows.read(i, place, place + 1, piece, formed)
                total += piece[0]
            out[row] = total / max(len(places), 1)
        if self._padding:
            out[self._padding] = 0
            step = max(CHUNK // max(info.nbytes // info.shape[0], 1), 1)
            total = sum((part.double().sum(0) for part in out.split(step)), torch.zeros(()).double())
            out[self._padding] = (total / (len(out) - len(self._padding))).to(info.dtype)


def _runs(kept: Tensor) -> list[tuple[int, int]]:
    """[first, last) of the stretches where each row's own row is one more than the one before."""
    if len(kept) == 0:
        return []
    breaks = torch.nonzero((kept[1:] != kept[:-1] + 1) | (kept[1:] < 0) | (kept[:-1] < 0)).flatten() + 1
    edges = [0, *breaks.tolist(), len(kept)]
    return [(a, b) for a, b in itertools.pairwise(edges) if int(kept[a]) >= 0]
