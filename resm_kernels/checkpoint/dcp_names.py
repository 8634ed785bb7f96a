"""Chooses a model's tensors among the entries of a torch DCP folder, and gives them their names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from resm_kernels.checkpoint.dcp_metadata import DcpMetadata, StoredTensor
from resm_kernels.checkpoint.format import CheckpointError
from resm_kernels.suggestions import did_you_mean

Keys = tuple[str, ...]

MODEL_KEYS: Final = ("model", "module", "state_dict", "model_state_dict")
"""The keys under which training scripts save a model's state dictionary."""
OPTIMIZER_KEYS: Final = ("optimizer", "optim", "optimizers", "optimizer_state_dict")
WRAPPERS: Final = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
"""What FSDP, activation checkpointing and torch.compile put into the names of the modules that they wrap."""
DATA_PARALLEL: Final = "module."
"""What DistributedDataParallel puts before all names."""


def model_tensors(folder: Path, metadata: DcpMetadata, key: str | None) -> tuple[dict[str, StoredTensor], str]:
    """Return the model's tensors by their names, and what else the folder holds in words ("" for nothing).

    `DcpReader` states the rules.

    Raises:
        CheckpointError: There is no state dictionary of that key, it is not clear which one is the model's, or two
            tensors have the same name.
    """
    tensors = list(metadata.tensors.values())
    section = _section(folder, tensors, key)
    inside = [t for t in tensors if _is_inside(t, section)]
    rest = [t for t in tensors if not _is_inside(t, section)]
    return _named(folder, inside, len(section)), _described(rest, metadata.others)


def _section(folder: Path, tensors: Sequence[StoredTensor], key: str | None) -> Keys:
    """Return the keys of the dictionary that holds the model's tensors; () for the outermost one."""
    sections = dict.fromkeys(t.path[:depth] for t in tensors for depth in range(1, len(t.path)))
    names = {".".join(section): section for section in sections}
    if key is not None:
        if key not in names:
            known = ", ".join(list(names)[:10]) or "none: it holds a single flat dictionary"
            raise CheckpointError(
                f"{folder}: has no dictionary {key!r} (state_dict_key){did_you_mean(key, tuple(names))}; it has {known}"
            )
        return names[key]
    found = list(dict.fromkeys(s for t in tensors if (s := _known_section(t.path)) is not None))
    if not found and any(_is_inside(t, ()) for t in tensors):
        return ()
    if not found:
        found = list(dict.fromkeys(t.path[:1] for t in tensors if t.path[0] not in OPTIMIZER_KEYS))
    if not found:
        raise CheckpointError(f"{folder}: holds no tensors of a model; need a state dictionary under {MODEL_KEYS[0]!r}")
    if len(found) > 1:
        listed = ", ".join(map(".".join, found[:10]))
        raise CheckpointError(
            f"{folder}: holds {len(found)} state dictionaries ({listed}); name the one to merge by the recipe's key "
            "state_dict_key"
        )
    return found[0]


def _known_section(path: Keys) -> Keys | None:
    """Return the part of a path up to the first key that models are saved under, if no optimizer's is before it."""
    for depth, part in enumerate(path[:-1]):
        if part in OPTIMIZER_KEYS:
            return None
        if part in MODEL_KEYS:
            return path[: depth + 1]
    return None


def _is_inside(tensor: StoredTensor, section: Keys) -> bool:
    if section:
        return len(tensor.path) > len(section) and tensor.path[: len(section)] == section
    return len(tensor.path) == 1 and tensor.key.partition(".")[0] not in OPTIMIZER_KEYS


def _named(folder: Path, tensors: Iterable[StoredTensor], depth: int) -> dict[str, StoredTensor]:
    """Return the tensors by their names in the model, in the order of the files that they begin in."""

    def place(tensor: StoredTensor) -> tuple[str, int]:
        return (tensor.chunks[0].file, tensor.chunks[0].position) if tensor.chunks else ("", 0)

    named: dict[str, StoredTensor] = {}
    for tensor in sorted(tensors, key=place):
        name = ".".join(tensor.path[depth:])
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        if name in named:
            raise CheckpointError(
                f"{folder}: {named[name].key!r} and {tensor.key!r} are both tensor {name!r} without what wrappers put "
                "into names"
            )
        named[name] = tensor
    if all(name.startswith(DATA_PARALLEL) for name in named):
        return {name.removeprefix(DATA_PARALLEL): tensor for name, tensor in named.items()}
    return named


def _described(tensors: Sequence[StoredTensor], others: Sequence[Keys]) -> str:
    """Return in words how many tensors of which keys are left out, and how many entries that are no tensors."""
    counts = Counter(t.path[0] if len(t.path) > 1 else t.key.partition(".")[0] for t in tensors)
    parts = [f"{count} tensor{'s' if count > 1 else ''} under {name!r}" for name, count in counts.items()]
    if others:
        kinds = list(dict.fromkeys(path[0] for path in others))
        listed = ", ".join(map(repr, kinds[:4])) + (", …" if len(kinds) > 4 else "")
        parts.append(f"{'1 entry' if len(others) == 1 else f'{len(others)} entries'} without tensors ({listed})")
    return ", ".join(parts)
