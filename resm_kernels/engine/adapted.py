"""The class and the configuration of a model with an adapter that adds a head, such as a classifier's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from resm_kernels.engine.architecture import find_architecture
from resm_kernels.lora import AdapterReader
from resm_kernels.tensor_names import OUTPUT_HEAD, last_part, module_of

_TASKS: Final = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
_CLASS_END: Final = re.compile(r"(For[A-Z]\w*|LMHeadModel|DoubleHeadsModel|Model)$")
_SCORES: Final = ("score", "classifier", "out_proj", "qa_outputs")
"""Last parts of the names of modules that give a value for each label, the last one of several counts."""
_SHOWN: Final = 3


@dataclass(frozen=True)
class AdaptedModel:
    """What a model with an adapter is, beside its tensors.

    Attributes:
        config: Its config.json.
        left_out: The tensors of the base model that it does not have.
        notes: What a user should know, a line each.
    """

    config: Mapping[str, Any]
    left_out: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


def adapted_model(reader: AdapterReader, config: Mapping[str, Any], base_folder: Path) -> AdaptedModel:
    """Return what an adapter makes of its base model.

    An adapter that stores a head which the base model does not have was made for another class. The adapter's
    configuration records that class, or the task, from which it follows; the number of labels is the number of rows of
    the head.

    Args:
        reader: Reads the base model with the adapter.
        config: The base model's config.json.
        base_folder: The base model's folder.
    """
    added = [name for name in reader.added if name != OUTPUT_HEAD]
    if not added:
        return AdaptedModel(config)
    names = config.get("architectures")
    base_class = str(names[0]) if isinstance(names, list) and names else ""
    end = _TASKS.get(str(reader.config.task_type))
    guessed = _CLASS_END.sub(end, base_class) if end is not None else None
    model_class = reader.config.model_class or guessed
    head = f"adds {', '.join(added[:_SHOWN])}{', …' if len(added) > _SHOWN else ''}, which {base_folder} does not have"
    if model_class is None or model_class == base_class:
        return AdaptedModel(
            config,
            notes=(
                f"{reader.folder}: {head}; its adapter_config.json records no class, so set architectures and "
                "num_labels in the output's config.json",
            ),
        )
    new = deepcopy(dict(config)) | {"architectures": [model_class]}
    labels = _labels(reader)
    if labels is not None and len(new.get("id2label") or {}) != labels:
        new["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
        new["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
    architecture = find_architecture(base_folder, new)
    kept = set(reader.added)
    left_out = {OUTPUT_HEAD} & reader.base.tensors.keys()
    missing: frozenset[str] = frozenset()
    if architecture is not None:
        loaded = architecture.loaded(reader.tensors)
        left_out = {name for name, entry in loaded.items() if not entry.known and name not in kept}
        has = {entry.name for name, entry in loaded.items() if name not in left_out}
        missing = architecture.needed - has
    notes = [f"{reader.folder}: {head}: the output is a {model_class}" + (f" of {labels} labels" if labels else "")]
    if left_out:
        notes.append(f"{reader.folder}: leaves out {', '.join(sorted(left_out)[:_SHOWN])}, which it does not have")
    if missing:
        shown = ", ".join(sorted(missing)[:_SHOWN])
        notes.append(
            f"{reader.folder}: neither it nor {base_folder} has {shown}, which a {model_class} makes at random"
        )
    return AdaptedModel(new, frozenset(left_out), tuple(notes))


def _labels(reader: AdapterReader) -> int | None:
    """Return the number of labels: of rows of the head's last weight."""
    heads = [name for name in reader.added if name.endswith(".weight") and last_part(module_of(name)) in _SCORES]
    heads.sort(key=lambda name: _SCORES.index(last_part(module_of(name))))
    return reader.added[heads[-1]].shape[0] if heads else None
