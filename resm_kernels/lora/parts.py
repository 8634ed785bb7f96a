"""Reads from the names in an adapter's file which module each tensor belongs to, and what part of its change it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from resm_kernels.checkpoint import CheckpointError, TensorInfo
from resm_kernels.lora.config import PREFIX

_WRAPPED: Final = "base_layer"
_SAVED: Final = "modules_to_save"
_ORIGINAL: Final = "original_module"

_PARTS: Final = {
    "lora_A": "A",
    "lora_B": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "magnitude",
    **{name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{name: name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")},
    "trainable_tokens_delta": "tokens",
}
"""The names that PEFT gives to the parts of a change, and what they are called here."""
_MODULES: Final = ("lora_A", "lora_B")
"""Those that are modules, whose tensors are called `weight` and `bias`."""


@dataclass
class StoredModule:
    """The tensors that an adapter stores for one module or parameter.

    Attributes:
        name: The module's name as in the loaded model.
        depth: How many other changes of the same module wrap this one. PEFT wraps a module once for each of its
            parameters that it adapts by name (`target_parameters`), the last parameter outermost.
        embedding: True if it is an embedding, whose factors have other names.
        parts: "A" and "B" of LoRA, "bias", "magnitude" (DoRA), "tokens", and those of LoHa and LoKr by their names.
    """

    name: str
    depth: int = 0
    embedding: bool = False
    parts: dict[str, TensorInfo] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        """The file that holds the tensors."""
        return next(iter(self.parts.values())).file


@dataclass
class StoredAdapter:
    """The tensors of an adapter's file.

    Attributes:
        modules: The changed modules.
        saved: The tensors that replace those of the base, by their names in the loaded model.
    """

    modules: list[StoredModule] = field(default_factory=list)
    saved: dict[str, TensorInfo] = field(default_factory=dict)


class _Name(NamedTuple):
    """A tensor's name in pieces: module, depth, part, the adapter's own name (empty if it has none), last word."""

    module: str
    depth: int
    part: str
    adapter: str
    leaf: str


def read_stored(tensors: Mapping[str, TensorInfo]) -> StoredAdapter:
    """Return what the tensors of an adapter's file are.

    Names may contain the name that the adapter had in training, as in `lora_A.default.weight`. It means nothing.

    Raises:
        CheckpointError: A name is not one that PEFT gives, or the file holds several adapters.
    """
    named: dict[str, _Name] = {}
    saved: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        inner = name.removeprefix(PREFIX)
        if inner == name:
            raise CheckpointError(f"{info.file}: tensor {name!r}: need names that begin with {PREFIX!r}")
        if "\n" in name:  # of which PEFT's patterns have a view of their own
            raise CheckpointError(f"{info.file}: tensor {name!r}: need names without line breaks")
        split = _split(inner)
        if split is not None:
            named[name] = split
        else:
            saved[inner] = info
    _check_one_adapter(tensors, named)
    adapter = next((split.adapter for split in named.values() if split.adapter), "default")
    result = StoredAdapter(saved=_saved(saved, adapter))
    modules: dict[tuple[str, int], StoredModule] = {}
    for name, split in named.items():
        info = tensors[name]
        key = split.module, split.depth
        if key not in modules:
            modules[key] = StoredModule(*key)
            result.modules.append(modules[key])
        module, part = modules[key], _PARTS[split.part]
        if split.leaf == "bias":
            part = "bias" if part == "B" else ""
        if part in ("", *module.parts):
            raise CheckpointError(f"{info.file}: tensor {name!r} is not one that PEFT stores")
        module.parts[part] = info
        module.embedding |= "embedding" in split.part
    return result


def _split(name: str) -> _Name | None:
    """Return the pieces of the name of a part; None for any other tensor."""
    words = name.split(".")
    for at in range(len(words) - 1, max(0, len(words) - 4), -1):
        if words[at] in _PARTS:
            break
    else:
        return None
    part, rest = words[at], words[at + 1 :]
    leaf = rest.pop() if rest and (part in _MODULES or rest[-1] == "weight") else ""
    if len(rest) > 1 or (part in _MODULES and leaf not in ("weight", "bias")):
        return None
    if part == "trainable_tokens_delta" and words[at - 1] == "token_adapter":
        at -= 1
    owner = words[:at]
    depth = 0
    while owner and owner[-1] == _WRAPPED:
        owner.pop()
        depth += 1
    owner = [word for word in owner if word != _WRAPPED]
    return _Name(".".join(owner), depth, part, rest[0] if rest else "", leaf)


def _check_one_adapter(tensors: Mapping[str, TensorInfo], named: Mapping[str, _Name]) -> None:
    names = sorted({split.adapter for split in named.values()})
    if len(names) > 1:
        file = tensors[next(iter(named))].file
        shown = ", ".join(repr(name) if name else "one without a name" for name in names)
        raise CheckpointError(
            f"{file}: holds {len(names)} adapters ({shown}), need one; save the one that is meant alone (peft: "
            "save_pretrained(folder, selected_adapters=[name]))"
        )


def _saved(stored: Mapping[str, TensorInfo], adapter: str) -> dict[str, TensorInfo]:
    """Return the tensors that are stored whole, by the names that they have in the loaded model."""
    saved: dict[str, TensorInfo] = {}
    originals: dict[str, TensorInfo] = {}
    for name, info in stored.items():
        words = [word for word in name.split(".") if word != _WRAPPED]
        kind = next((word for word in (_SAVED, _ORIGINAL) if word in words), None)
        if kind is not None:
            at = words.index(kind)
            inner = words[at + 1 :]
            if kind == _SAVED and len(inner) > 1 and inner[0] == adapter:
                del inner[0]
            words = words[:at] + inner
        key = ".".join(words)
        # PEFT stores a module whose vocabulary has grown twice, and loads it by its plain name.
        if kind is None or key not in stored:
            (originals if kind == _ORIGINAL else saved)[key] = info
    # Older versions of PEFT stored a module twice: as it was before the training, and as it is after it.
    if lost := _first_not_in(originals, saved):
        raise CheckpointError(
            f"{originals[lost].file}: has {lost!r} as it was before the training alone; save it again"
        )
    return saved


def _first_not_in(names: Iterable[str], others: Iterable[str]) -> str | None:
    """Return the first name that is not among the others, or None."""
    known = set(others)
    return next((name for name in names if name not in known), None)
