"""Asks transformers under which names it would load a model's tensors, from the model's class without its weights."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from resm_kernels.checkpoint import TensorInfo, json_bytes, read_config
from resm_kernels.checkpoint.auxiliary import CONFIG_FILE
from resm_kernels.checkpoint.forms import gguf_file, pretrained
from resm_kernels.engine.spelling_rules import IGNORED_WEIGHT, MADE, Kind, buffer_kind
from resm_kernels.engine.weight_loading import WeightLoading
from resm_kernels.files import first_line, shortened
from resm_kernels.tensor_names import layer_position

_UNRELATED: Final = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "quantization_config")
"""Entries of a config.json on which names do not depend."""

_LAYERS: Final = re.compile(r"layer|depth|blocks?$")
_EXPERTS: Final = re.compile(r"experts?$")
_MOST_PARTS: Final = 200_000
"""The most layers times experts of a model that is built; the largest models have some ten thousand."""
_MOST_KEPT: Final = 8
"""The most architectures that are kept, so that they are not built again; one holds some megabytes."""


@dataclass(frozen=True)
class Loaded:
    """What transformers makes of a stored tensor.

    Attributes:
        name: Its name in the loaded model. A tensor that is joined with others has the name that it has before that.
        known: True if the loaded model has such a tensor.
        ignored: What it is, if it is a buffer that the model computes itself or a weight that it is known to leave out:
            one that it ignores without a warning, one in a layer that it does not have, or one of another head of its
            family. None for all others.
    """

    name: str
    known: bool
    ignored: Kind | None = None


class Architecture(WeightLoading):
    """The names of one class of transformers with one configuration.

    Args:
        model: The model, on the meta device.

    Attributes:
        tied: For each tensor that is tied to another the other one's name, both as in the loaded model.
        may_miss: Patterns of tensors that the model makes itself where a checkpoint lacks them.
        unsaved: Names of parameters that the model always makes itself, and does not save.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.tied: Mapping[str, str] = dict(model.all_tied_weights_keys)
        self.may_miss = _pattern(model._keys_to_ignore_on_load_missing or ())
        self.unsaved = frozenset(getattr(model, "_keys_to_ignore_on_save", None) or ())
        buffers = [name for name, _ in model.named_buffers()]
        self._computed = {name for name in buffers if name not in self._state}
        patterns = set(model._keys_to_ignore_on_load_unexpected or ())
        # These two exceptions are written in transformers' `_adjust_missing_and_unexpected_keys` itself.
        if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
            patterns.add(r"rotary_emb\.inv_freq")
        if any(name.endswith("position_ids") for name in buffers):
            patterns.add(r"(^|\.)position_ids$")
        self._ignored = _pattern(patterns)
        self._layers: dict[str, int] = {}
        for position in filter(None, map(layer_position, self._state)):
            self._layers[position.stack] = max(position.number + 1, self._layers.get(position.stack, 0))

    @property
    def config(self) -> Any:
        """The configuration, as transformers has read it."""
        return self._model.config

    @property
    def model(self) -> Any:
        """The model, on the meta device."""
        return self._model

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of the loaded model."""
        return {name: tuple(tensor.shape) for name, tensor in self._state.items()}

    def with_entries(self, entries: Mapping[tuple[str, ...], Any]) -> Architecture:
        """Return the same class with other entries in its configuration, each named by its sections and its key.

        Raises:
            Exception: Whatever the class raises for a configuration that it does not take.
        """
        config = copy.deepcopy(self._model.config)
        for path, value in entries.items():
            setattr(functools.reduce(getattr, path[:-1], config), path[-1], value)
        return Architecture(_on_meta(type(self._model), config))

    def with_config(self, entries: Mapping[str, Any]) -> Architecture:
        """Return the same class with the configuration that a config.json with these entries gives.

        Raises:
            Exception: Whatever the class raises for a configuration that it does not take.
        """
        with _quiet(), tempfile.TemporaryDirectory() as folder:
            # Not from the mapping itself, because some numbers are written as texts in files.
            content = json_bytes({key: value for key, value in entries.items() if key not in _UNRELATED})
            (Path(folder) / CONFIG_FILE).write_bytes(content)
            config = type(self._model.config).from_pretrained(folder, local_files_only=True)
        return Architecture(_on_meta(type(self._model), config))

    def missing(self, names: Iterable[str]) -> list[str]:
        """Return the tensors of the model that a checkpoint with these names leaves without values."""
        present = {renamed.key for renamed in self.renamed(names).values()}
        present |= {name for pair in self.tied.items() if not present.isdisjoint(pair) for name in pair}
        return [
            name
            for name in self._state
            if name not in present | self.unsaved and not (self.may_miss and self.may_miss.search(name))
        ]

    def layers(self, stack: str) -> list[Any]:
        """Return the modules of a stack of layers, whose name ends with a dot, in order."""
        return list(self._model.get_submodule(stack.removesuffix(".")))

    def loaded(self, tensors: Mapping[str, TensorInfo]) -> dict[str, Loaded]:
        """Return what transformers makes of each tensor of a checkpoint."""
        result = {}
        for name, renamed in self.renamed(tensors).items():
            known = renamed.key in self._state
            ignored = None if known else self._ignored_kind(renamed.piece, tensors[name])
            result[name] = Loaded(renamed.piece, known, ignored)
        return result

    def keys(self, names: Iterable[str]) -> dict[str, str]:
        """Return for each tensor of a checkpoint the tensor of the loaded model that it becomes, or a part of."""
        return {name: renamed.key for name, renamed in self.renamed(names).items()}

    def loaded_name(self, name: str) -> str:
        """Return the name in the loaded model of a tensor that has another name in a file or in an older version."""
        return name if name in self._state else self.renamed([name])[name].piece

    def parameters(self, module: str) -> list[str]:
        """Return the last parts of the names of the parameters that a module owns itself, in its order."""
        owner = self._module(module)
        return [] if owner is None else [name for name, _ in owner.named_parameters(recurse=False)]

    def is_transposed(self, module: str) -> bool | None:
        """Return whether a module stores its weights as (in, out) or (experts, in, out); None if there is none."""
        owner = self._module(module)
        if owner is None:
            return None
        return type(owner).__name__ == "Conv1D" or bool(getattr(owner, "is_transposed", False))

    def _module(self, name: str) -> Any:
        for spelled in (name, f"{self._prefix}.{name}", self._bare(name)):
            with contextlib.suppress(AttributeError):
                return self._model.get_submodule(spelled)
        return None

    @property
    def needed(self) -> frozenset[str]:
        """The parameters that a checkpoint has to store, because the model neither makes nor ties them."""
        parameters = (name for name, _ in self._model.named_parameters())
        made = self.unsaved | self.tied.keys()
        may_miss = self.may_miss
        return frozenset(n for n in parameters if n not in made and (may_miss is None or not may_miss.search(n)))

    @functools.cached_property
    def untied(self) -> frozenset[str]:
        """The tied parameters that are not tied if the configuration says `tie_word_embeddings: false`."""
        config = copy.deepcopy(self._model.config)
        for section in (config, getattr(config, "text_config", None)):
            if section is not None:
                section.tie_word_embeddings = False
        return frozenset(self.tied.keys() - dict(_on_meta(type(self._model), config).all_tied_weights_keys).keys())

    def _ignored_kind(self, name: str, info: TensorInfo) -> Kind | None:
        if kind := buffer_kind(info):
            return kind
        if {name, f"{self._prefix}.{name}", self._bare(name)} & self._computed:
            return MADE
        position = layer_position(name)
        beyond = position is not None and position.number >= self._layers.get(position.stack, position.number + 1)
        listed = self._ignored is not None and self._ignored.search(name) is not None
        return IGNORED_WEIGHT if beyond or listed or self._bare(name) in self._other_heads else None

    def _bare(self, name: str) -> str:
        return name.removeprefix(f"{self._prefix}.")

    @functools.cached_property
    def _other_heads(self) -> frozenset[str]:
        """Tensors of the family's classes for pre-training and without a head, without the prefix: poolers, heads."""
        from transformers import MODEL_FOR_PRETRAINING_MAPPING, MODEL_MAPPING

        names: set[str] = set()
        for mapping in (MODEL_FOR_PRETRAINING_MAPPING, MODEL_MAPPING):
            found = mapping.get(type(self._model.config), ())
            for model_class in found if isinstance(found, tuple) else (found,):
                # A class that does not take this configuration has no tensors to add.
                with contextlib.suppress(AttributeError, TypeError, ValueError):
                    names.update(map(self._bare, _on_meta(model_class, self._model.config).state_dict()))
        return frozenset(names)


def find_architecture(folder: Path, config: Mapping[str, Any]) -> Architecture | None:
    """Return what transformers knows about a model; None if it knows nothing (see `ask_transformers`)."""
    known = ask_transformers(folder, config)
    return None if isinstance(known, str) else known


def ask_transformers(folder: Path, config: Mapping[str, Any]) -> Architecture | str:
    """Return what transformers knows about a model, or else why it knows nothing, in words.

    It is not installed, has no such class, or the class does not take the configuration. Configurations of more layers
    than any model has would take minutes or more to build, and are not. Only transformers' own classes count: no code
    of the model's folder is run.
    """
    try:
        import transformers
    except ImportError as error:
        return f"transformers cannot be imported ({first_line(error)})"
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    model_class: Any = getattr(transformers, name, None)
    if not isinstance(model_class, type) or not issubclass(model_class, transformers.PreTrainedModel):
        if not config:
            return "there is no config.json that names its class"
        return f"transformers has no class {shortened(name)}" if name else "config.json names no class (architectures)"
    if _parts(config) > _MOST_PARTS:
        return f"config.json asks for more than {_MOST_PARTS} layers and experts"
    try:
        return _built(_Question(model_class, names_key(config), _written(folder), folder))
    except Exception as error:  # whatever a class does with a configuration that it does not take
        return f"transformers' class {name} does not take its config.json ({first_line(error)})"


@dataclass(frozen=True)
class _Question:
    """What an architecture follows from; the folder is only where transformers reads it.

    Attributes:
        model_class: The class of transformers.
        config: The text of `names_key` of the configuration that the model is said to have.
        written: What the folder's files say, which transformers reads.
    """

    model_class: Any
    config: str
    written: object
    folder: Path = field(compare=False)


@functools.lru_cache(maxsize=_MOST_KEPT)
def _built(question: _Question) -> Architecture:
    """Return the model of a question. Several parts of a merge ask the same one, and experts are mostly of one kind."""
    from transformers import AutoConfig

    with _quiet():
        place = pretrained(question.folder, gguf_file(question.folder))
        parsed = AutoConfig.from_pretrained(**place, local_files_only=True, trust_remote_code=False)
        if hasattr(parsed, "quantization_config"):
            del parsed.quantization_config
        return Architecture(_on_meta(question.model_class, parsed))


def _written(folder: Path) -> object:
    """Return what tells apart the configurations that transformers reads in folders."""
    file = gguf_file(folder)
    if file is None:
        return names_key(read_config(folder))
    state = file.stat()
    return file, state.st_ino, state.st_size, state.st_mtime_ns


def parsed_entries(folder: Path) -> dict[str, Any] | None:
    """Return every entry of a folder's config.json as transformers reads it, with its defaults; None if it cannot."""
    try:
        from transformers import AutoConfig
    except ImportError:
        return None
    with _quiet():
        try:
            entries = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).to_dict()
        except Exception:  # whatever a class does with a configuration that it does not take
            return None
    return dict(entries)


def _parts(config: Mapping[str, Any]) -> int:
    """Return how many layers times experts the configuration asks for at most, summed over its sections."""
    layers = experts = 1
    nested = 0
    for key, value in config.items():
        entries = value if isinstance(value, list) else [value]
        nested += sum(_parts(section) for section in entries if isinstance(section, Mapping))
        # Depths of stages add up; other lists have an entry for each layer, or are numbers of layers.
        counts = [n for n in entries if isinstance(n, int) and (value is n or "depth" in key)]
        if _LAYERS.search(key):
            layers = max(layers, sum(counts), len(entries))
        elif _EXPERTS.search(key):
            experts = max(experts, sum(counts))
    return layers * experts + nested


def _on_meta(model_class: Any, config: Any) -> Any:
    """Return a model without weights."""
    with _quiet(), torch.device("meta"):
        return model_class._from_config(copy.deepcopy(config))


def names_key(config: Mapping[str, Any]) -> str:
    """Return a text that is the same for configurations which give tensors the same names."""
    return json.dumps({k: v for k, v in config.items() if k not in _UNRELATED}, sort_keys=True, default=str)


def _pattern(patterns: Iterable[str]) -> re.Pattern[str] | None:
    joined = "|".join(f"({pattern})" for pattern in sorted(patterns))
    return re.compile(joined) if joined else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from printing warnings about a model that nobody runs."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
