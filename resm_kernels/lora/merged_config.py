"""The adapter_config.json of a merged adapter, and what a user should know before serving it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from resm_kernels.checkpoint import CheckpointError
from resm_kernels.lora.config import CONFIG_FILE
from resm_kernels.lora.group import AdapterGroup
from resm_kernels.lora.peft_names import rank_patterns, target_names
from resm_kernels.lora.writer import adapter_config
from resm_kernels.tensor_names import module_of

VLLM_RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's --max-lora-rank may have."""

# What the factors do not depend on; the merged adapter takes it over where the adapters agree.
_TAKEN_OVER: Final = ("task_type", "auto_mapping", "revision")
_BIASES: Final = ("none", "lora_only", "all")
# Entries that restrict the modules which names in target_modules stand for.
_RESTRICTING: Final = ("exclude_modules", "layers_to_transform", "layers_pattern")


def merged_config(group: AdapterGroup, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return the entries of the merged adapter's configuration, whose scale is 1 in every module.

    Args:
        group: The adapters.
        ranks: The rank of each module.
    """
    largest = max(ranks.values())
    patterns = rank_patterns(ranks) if len(set(ranks.values())) > 1 else {}
    saved = [a.entries.get("modules_to_save") or [] for a in group.adapters]
    biases = [a.entries.get("bias") or "none" for a in group.adapters]
    entries = {
        "base_model_name_or_path": group.base_name,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": _targets(group, [name for name in ranks if not group.is_parameter(name)]),
        "modules_to_save": sorted({module for modules in saved for module in modules}) or None,
        "bias": max(biases, key=_BIASES.index),
        "fan_in_fan_out": any(a.config.fan_in_fan_out for a in group.adapters),
    }
    if parameters := sorted(name for name in ranks if group.is_parameter(name)):
        entries["target_parameters"] = parameters
    for key in _TAKEN_OVER:
        values = [a.entries.get(key) for a in group.adapters]
        if all(value == values[0] for value in values):
            entries[key] = values[0]
        elif key == "task_type":
            raise CheckpointError(
                f"{group.folders[1] / CONFIG_FILE}: task_type is {values[1]!r}, but {group.folders[0]} has "
                f"{values[0]!r}; need adapters of one task type"
            )
    return adapter_config("", None, **entries)


def _targets(group: AdapterGroup, modules: Sequence[str]) -> list[str] | str:
    """Return names that match the merged modules and no others."""
    if not modules:
        return []
    if group.base is not None:
        return target_names(modules, set(map(module_of, group.base.reader.tensors)))
    entries: list[Any] = [a.entries.get("target_modules") for a in group.adapters]
    restricted = any(a.entries.get(key) for a in group.adapters for key in _RESTRICTING)
    lists = [names for names in entries if isinstance(names, list)]
    if restricted or len(lists) < len(entries):
        return sorted(modules)
    # Each adapter has factors for every module that its names match, so that all names together match all modules.
    return sorted({name for names in lists for name in names})


def rank_notes(group: AdapterGroup, ranks: Mapping[str, int], saved: Sequence[str]) -> list[str]:
    """Return lines about what vLLM needs, or cannot serve."""
    largest = max(ranks.values())
    served = next((rank for rank in VLLM_RANKS if rank >= largest), None)
    notes = []
    if served is None:
        notes.append(
            f"rank {largest} is above {VLLM_RANKS[-1]}, the largest that vLLM serves: pass a rank of {VLLM_RANKS[-1]} "
            "or less"
        )
    elif largest > 16:
        notes.append(f"vLLM serves this adapter with --max-lora-rank {served}; its default is 16")
    if saved:
        notes.append(f"vLLM serves no adapter with tensors that are stored whole, such as {saved[0]}")
    if embedded := [name for name in ranks if group.embedding(name)]:
        notes.append(f"vLLM may not serve adapters of embeddings, such as {embedded[0]}")
    return notes
