"""Matches the tensors of models by what transformers would load, where their files spell them in different ways.

Each tensor gets the name that it has in the loaded model. Tensors of several models that have the same one are one
tensor, and go by the name in the reference model's files. Buffers that a model computes itself and copies of tied
tensors are left out; so are tensors that transformers does not load, unless every model has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import torch

from resm_kernels.checkpoint import CheckpointReader, RearrangedReader, RespelledReader, TensorInfo
from resm_kernels.checkpoint.auxiliary import config_entry
from resm_kernels.engine.architecture import Architecture, Loaded, ask_transformers, names_key
from resm_kernels.engine.loaded import Spelled, SpelledModel
from resm_kernels.engine.rearrangements import rearranged
from resm_kernels.engine.spelling_rules import (
    COPY,
    EMPTY_BIAS,
    IGNORED_WEIGHT,
    MADE,
    UNINDEXED,
    Kind,
    buffer_kind,
    common_prefix,
    copies,
    renamed,
)
from resm_kernels.lora import LoadedModel, Parameter
from resm_kernels.lora.config import is_tied
from resm_kernels.tensor_names import OUTPUT_HEAD, LayerPosition, is_tied_embedding, layer_position, unnumbered

if TYPE_CHECKING:
    from resm_kernels.engine.models import Model

_TENSOR: Final = Kind("tensor", "tensors")
_STACK: Final = 3
"""The dimensions of a tensor of all experts of a layer."""
_SHOWN: Final = 60
"""The most letters of a name that notes show; the front of a longer one is cut."""


@dataclass
class _Tensors:
    """The tensors of one model.

    Attributes:
        model: The model.
        stored: For each name in the loaded model the one in the files.
        ignored: Which of these transformers does not load.
        left_out: For each tensor that is left out, by its name in the files, what it is.
        added: Names in the files of tensors that the index does not name, but transformers loads.
        tied: For each tensor that is tied to another the other one's name, both as in the loaded model.
        architecture: What transformers knows about the model, or None.
    """

    model: Model
    stored: dict[str, str] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)
    left_out: dict[str, Kind] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    tied: Mapping[str, str] = field(default_factory=dict)
    architecture: Architecture | None = None

    @property
    def reader(self) -> CheckpointReader:
        return self.model.reader

    def info(self, name: str) -> TensorInfo:
        """Return the description of a tensor by its name in the files."""
        found = self.reader.tensors.get(name)
        return self.reader.unindexed[name] if found is None else found

    def leave_out(self, loaded: str, kind: Kind) -> None:
        self.left_out[self.stored.pop(loaded)] = kind


class Spellings:
    """The spellings of several models.

    Args:
        models: Whole models, the reference first.
        as_stored: Keep buffers and copies of tied tensors where every model stores the same tensors.

    Attributes:
        notes: What is left out, renamed, rearranged or added, a line for each model and kind.
        remarks: Why transformers is not asked, where that would be needed.
    """

    def __init__(self, models: Sequence[Model], *, as_stored: bool = False) -> None:
        self._models = models
        self._matched: list[_Tensors] | None = None
        self._prefix = ""
        self.notes: list[str] = []
        self.remarks: list[str] = []
        self.readers: list[CheckpointReader] = [model.reader for model in models]
        for model in models:
            if model.reader.other_files:
                self.notes.append(
                    f"{model.folder}: leaves out {', '.join(model.reader.other_files)}, other files of weights"
                )
        if _in_doubt(models, as_stored=as_stored):
            for i, tensors in enumerate(self._tensors()):
                names = self._names(tensors)
                self.readers[i] = tensors.reader
                if any(new != old for new, old in names.items()) or len(names) != len(tensors.reader.tensors):
                    self.readers[i] = RespelledReader(tensors.reader, names)
                self.notes += _notes(tensors, names)

    def loaded_model(self, i: int) -> LoadedModel:
        """Return where the parameters of model `i` are in `readers[i]`, by the names that they have when it is loaded.

        Names of any version of transformers are understood.
        """
        return SpelledModel(self.readers[i], lambda: self._spelled(i))

    def untie(self) -> list[str]:
        """Let each model have its tied embeddings and output heads apart; return a line for each model.

        The models then need `tie_word_embeddings: false` in their configurations.
        """
        notes = []
        for i, tensors in enumerate(self._tensors()):
            architecture, reader = tensors.architecture, self.readers[i]
            tied = self._ties(tensors)
            loaded = self.loaded_model(i)
            names = {name: name for name in reader.tensors}
            for copy, original in tied.items():
                found = loaded.locate(original)
                stored = None if found is None else found.stored_whole
                if stored is not None and copy not in names and (architecture is None or copy in architecture.untied):
                    names[copy] = stored
            added = [copy for copy in names if copy not in reader.tensors]
            if added:
                self.readers[i] = RespelledReader(reader, names)
                notes.append(f"{tensors.model.folder}: unties {', '.join(added)} from {names[added[0]]}")
        return notes

    @staticmethod
    def _ties(tensors: _Tensors) -> Mapping[str, str]:
        """Return the tied parameters of a model, the copy's name → the original's."""
        if tensors.architecture is not None:
            return tensors.architecture.tied
        if not is_tied(tensors.model.config, tensors.reader.tensors):
            return {}
        embedding = next(filter(is_tied_embedding, tensors.reader.tensors), None)
        return {} if embedding is None else {OUTPUT_HEAD: embedding}

    def _spelled(self, i: int) -> Spelled:
        tensors = self._tensors()[i]
        readable = {stored: new for new, stored in self._names(tensors).items()}
        return Spelled(
            architecture=tensors.architecture,
            names={loaded: readable[stored] for loaded, stored in tensors.stored.items() if stored in readable},
            stored={stored: (new, tensors.info(stored).shape) for stored, new in readable.items()},
            tied=tensors.tied,
            loaded_name=lambda name: self._loaded_name(tensors, name),
        )

    def _tensors(self) -> list[_Tensors]:
        if self._matched is None:
            self._matched = self._match()
        return self._matched

    def _match(self) -> list[_Tensors]:
        models = [_Tensors(model) for model in self._models]
        by_key: dict[str, Architecture | str] = {}
        for tensors in models:
            key = names_key(tensors.model.config)
            if key not in by_key:
                by_key[key] = known = ask_transformers(tensors.model.base_folder, tensors.model.config)
                if isinstance(known, str):
                    self.remarks.append(
                        f"{tensors.model.folder}: {known}; tensors of other names are matched by a small table"
                    )
            found = by_key[key]
            tensors.architecture = None if isinstance(found, str) else found
        if any(tensors.architecture is None for tensors in models):
            self._read_by_table(models)
        else:
            self.notes += _rearrange(models)
            for tensors in models:
                assert tensors.architecture is not None
                tensors.tied = tensors.architecture.tied
                _assign(tensors, tensors.architecture.loaded(_all_infos(tensors.reader)))
        _settle_unindexed(models)
        _leave_out_copies(models)
        _leave_out_ignored(models)
        return models

    def _read_by_table(self, models: Sequence[_Tensors]) -> None:
        """Name tensors by the table, because transformers does not know every model."""
        named = []
        for tensors in models:
            tensors.architecture = None
            infos = _all_infos(tensors.reader)
            buffers = {name: kind for name, info in infos.items() if (kind := buffer_kind(info))}
            named.append((tensors, infos, buffers, renamed(infos)))
        shapes = [
            {new: infos[old].shape for old, new in names.items() if old not in buffers}
            for _, infos, buffers, names in named
        ]
        for shape_of in shapes:
            for copy in copies(shape_of):
                del shape_of[copy]
        self._prefix = common_prefix(shapes)
        for tensors, _, buffers, names in named:
            loaded = {old: Loaded(new.removeprefix(self._prefix), True, buffers.get(old)) for old, new in names.items()}
            _assign(tensors, loaded)
            tensors.tied = copies(tensors.stored)

    def _loaded_name(self, tensors: _Tensors, name: str) -> str:
        if tensors.architecture is not None:
            return tensors.architecture.loaded_name(name)
        return renamed([name, *tensors.stored])[name].removeprefix(self._prefix)

    def _names(self, tensors: _Tensors) -> dict[str, str]:
        """Return for each tensor of a model that is not left out its name in the reference model and in its files.

        A tensor that the reference model does not have keeps its name, but layers are called as the reference's are.
        """
        reference = self._tensors()[0].stored
        stacks: dict[str, LayerPosition] = {}
        for loaded, stored in reference.items():
            position, other = layer_position(loaded), layer_position(stored)
            if position is not None and other is not None:
                stacks[position.unnumbered] = other
        order = {name: i for i, name in enumerate(tensors.reader.tensors)}
        names: dict[str, str] = {}
        for loaded, stored in sorted(tensors.stored.items(), key=lambda item: order.get(item[1], len(order))):
            new = reference.get(loaded, stored)
            position = layer_position(loaded)
            if loaded not in reference and position is not None and position.unnumbered in stacks:
                stack = stacks[position.unnumbered]
                new = f"{stack.stack}{position.number}{stack.rest}"
            names[loaded if new in names else new] = stored
        return names


def _rearrange(models: Sequence[_Tensors]) -> Iterator[str]:
    """Let models give those tensors that the reference model stores joined or apart as it does; yield a line for each.

    These are experts that are stored one by one or as one tensor, or as a transposed one, and layers that are joined.
    """
    stored = _all_infos(models[0].reader)
    shapes = {name: info.shape for name, info in stored.items()}
    wanted: list[Parameter] | None = None
    for tensors in models[1:]:
        own = _all_infos(tensors.reader)
        if {name: info.shape for name, info in own.items()} == shapes:
            continue
        assert models[0].architecture is not None and tensors.architecture is not None
        wanted = models[0].architecture.held(stored) if wanted is None else wanted
        made, consumed = rearranged(wanted, stored, tensors.architecture.held(own), own)
        if made:
            tensors.model = replace(tensors.model, reader=RearrangedReader(tensors.reader, made, consumed))
            new, (_, parts) = next(iter(made.items()))
            many = f"{_TENSOR.counted(len(consumed))} as {len(made)}"
            of = f"{parts[0].name} as {new}{_more(consumed)}"
            yield f"{tensors.model.folder}: reads {many} in another arrangement ({of})"


def _in_doubt(models: Sequence[Model], *, as_stored: bool) -> bool:
    """Return True if names differ between models, or if there may be buffers or copies to leave out."""
    seen: list[Mapping[str, TensorInfo]] = []
    for model in models:
        tensors = model.reader.tensors
        if model.reader.unindexed:
            return True
        if any(tensors.keys() == other.keys() for other in seen):
            continue
        # A file or component without a configuration of transformers' may be loaded by what needs buffers too.
        has_class = not as_stored and not model.config.keys().isdisjoint(("architectures", "model_type"))
        if has_class and (any(map(buffer_kind, tensors.values())) or _may_tie(model)):
            return True
        seen.append(tensors)
    kinds = [{unnumbered(name) for name in tensors} for tensors in seen] if len(seen) > 1 else []
    return any(names != kinds[0] for names in kinds) or _may_be_transposed(models)


def _may_be_transposed(models: Sequence[Model]) -> bool:
    """Return True if a model stores a stack of matrices with the dimensions of the first model's in another order."""
    first = {name: info.shape for name, info in models[0].reader.tensors.items() if len(info.shape) == _STACK}
    return any(
        (info := model.reader.tensors.get(name)) is not None
        and info.shape != shape
        and sorted(info.shape) == sorted(shape)
        for model in models[1:]
        for name, shape in first.items()
    )


def _may_tie(model: Model) -> bool:
    """Return True if a model may store copies of tied tensors; its configuration may say that the head is none."""
    untied = config_entry(model.config, "tie_word_embeddings", bool) is False
    return any(not (untied and copy.endswith("lm_head.weight")) for copy in copies(model.reader.tensors))


def _all_infos(reader: CheckpointReader) -> dict[str, TensorInfo]:
    return {**reader.tensors, **{n: i for n, i in reader.unindexed.items() if n not in reader.tensors}}


def _assign(tensors: _Tensors, loaded: Mapping[str, Loaded]) -> None:
    """Give each stored tensor its name in the loaded model; buffers are left out."""
    for name in tensors.reader.tensors:
        entry = loaded[name]
        if entry.ignored not in (None, IGNORED_WEIGHT):
            assert entry.ignored is not None
            tensors.left_out[name] = entry.ignored
            continue
        # Of two tensors that would become one, the second keeps its name, and is then one that no other model has.
        key = name if entry.name in tensors.stored else entry.name
        tensors.stored[key] = name
        if entry.ignored is not None:
            tensors.ignored.add(key)
    for name in tensors.reader.unindexed:
        if name in tensors.reader.tensors:
            tensors.left_out[name] = UNINDEXED
            continue
        entry = loaded[name]
        if entry.known and entry.ignored is None and entry.name not in tensors.stored:
            tensors.stored[entry.name] = name
            tensors.added.append(name)
        else:
            tensors.left_out[name] = UNINDEXED


def _settle_unindexed(models: Sequence[_Tensors]) -> None:
    """Without transformers, a tensor that the index does not name counts only if another model has it."""
    for tensors in models:
        if tensors.architecture is None:
            others = [other.stored for other in models if other is not tensors]
            for loaded in [key for key, name in tensors.stored.items() if name in tensors.added]:
                if not any(loaded in other for other in others):
                    tensors.added.remove(tensors.stored[loaded])
                    tensors.leave_out(loaded, UNINDEXED)


def _leave_out_copies(models: Sequence[_Tensors]) -> None:
    """Leave out tied tensors that are stored twice with the same bits; with other bits they are tensors of their own.

    A model that stores a tied tensor under the copy's name only has the original under it.
    """
    unequal: set[str] = set()
    pairs: list[tuple[_Tensors, str]] = []
    for tensors in models:
        for copy, original in tensors.tied.items():
            if copy not in tensors.stored:
                continue
            if original not in tensors.stored:
                tensors.stored[original] = tensors.stored.pop(copy)
            elif _same_bytes(tensors, copy, original):
                pairs.append((tensors, copy))
            else:
                unequal.add(copy)
    lacking = {copy for _, copy in pairs if any(copy not in tensors.stored for tensors in models)}
    for tensors, copy in pairs:
        # The table cannot know whether a model ties tensors that only happen to be equal in it.
        certain = tensors.architecture is not None or copy in lacking
        if copy not in unequal and certain:
            tensors.leave_out(copy, COPY)


def _same_bytes(tensors: _Tensors, first: str, second: str) -> bool:
    stored = {"first": tensors.stored[first], "second": tensors.stored[second]}
    return RespelledReader(tensors.reader, stored).same_bytes("first", "second")


def _leave_out_ignored(models: Sequence[_Tensors]) -> None:
    """Leave out what transformers does not load or makes itself, unless every model stores it."""
    for tensors in models:
        for loaded in list(tensors.stored):
            lacking = [other for other in models if loaded not in other.stored]
            if not lacking:
                continue
            if loaded in tensors.ignored:
                tensors.leave_out(loaded, IGNORED_WEIGHT)
            elif any(_makes(other, loaded, tensors) for other in lacking):
                tensors.leave_out(loaded, MADE)
            elif _is_empty_bias(tensors, loaded):
                tensors.leave_out(loaded, EMPTY_BIAS)


def _is_empty_bias(tensors: _Tensors, loaded: str) -> bool:
    """Return True for a bias of zeros of a layer that has none in the model's class, as AutoGPTQ's files have them."""
    known = tensors.architecture
    return known is not None and loaded.endswith(".bias") and loaded not in known.shapes and _is_zero(tensors, loaded)


def _makes(lacking: _Tensors, loaded: str, storing: _Tensors) -> bool:
    """Return True if a model without this tensor makes the one itself that another model stores."""
    known = lacking.architecture
    if known is None or loaded in known.unsaved:
        return known is not None
    may_miss = known.may_miss is not None and known.may_miss.search(loaded) is not None
    return may_miss and _is_zero(storing, loaded)


def _is_zero(tensors: _Tensors, loaded: str) -> bool:
    info = tensors.info(tensors.stored[loaded])
    return not bool(torch.count_nonzero(tensors.reader.read_info(info)))


def _notes(tensors: _Tensors, names: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each kind of tensors that are left out, renamed or added."""
    folder = tensors.model.folder
    kinds: dict[Kind, list[str]] = {}
    for name in (*tensors.reader.tensors, *tensors.reader.unindexed):
        if name in tensors.left_out:
            kinds.setdefault(tensors.left_out[name], []).append(name)
    for kind, left_out in kinds.items():
        yield f"{folder}: leaves out {kind.counted(len(left_out))} ({_shown(left_out)})"
    changed = [(old, new) for new, old in names.items() if new != old]
    if changed:
        old, new = changed[0]
        yield f"{folder}: reads {_TENSOR.counted(len(changed))} under another name ({old} as {new}{_more(changed)})"
    if tensors.added:
        count = UNINDEXED.counted(len(tensors.added))
        yield f"{folder}: adds {count}, but transformers loads ({_shown(tensors.added)})"


def adapter_note(folder: Any, renames: Mapping[str, str]) -> str:
    """Return the line about an adapter that names modules otherwise than its base model's files."""
    old, new = next(iter(renames.items()))
    return f"{folder}: applies to {_TENSOR.counted(len(renames))} under another name ({old} as {new}{_more(renames)})"


def _more(items: Any) -> str:
    return ", …" if len(items) > 1 else ""


def _shown(names: Sequence[str]) -> str:
    """Return the name of one tensor, or the end of the name that several in different layers have in common."""
    ends = dict.fromkeys(name if (p := layer_position(name)) is None else f"…{p.rest[1:]}" for name in names)
    first = next(iter(ends)) if len(names) > 1 else names[0]
    return (first if len(first) <= _SHOWN else f"…{first[-_SHOWN:]}") + _more(ends)
