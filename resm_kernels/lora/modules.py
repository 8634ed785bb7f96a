"""The names of an extracted adapter's tensors and modules, by the rules with which PEFT looks modules up."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from resm_kernels.tensor_names import OUTPUT_HEAD, is_tied_embedding, last_part, module_of


@dataclass
class Rest:
    """The changed tensors that are not decomposed, as an adapter stores them.

    Attributes:
        modules: The modules that PEFT's modules_to_save must name.
        tensors: The name of each stored tensor in the adapter, and its name in the fine-tuned model.
        saved: The changed tensors that the adapter stores.
        biases: True if some of them are biases of decomposed modules.
    """

    modules: set[str] = field(default_factory=set)
    tensors: dict[str, str] = field(default_factory=dict)
    saved: set[str] = field(default_factory=set)
    biases: bool = False

    @classmethod
    def collect(cls, changed: Collection[str], names: Mapping[str, Any], adapted: Collection[str], tied: bool) -> Rest:
        """Return what an adapter can store of the changed tensors.

        Args:
            changed: The names of the changed tensors that are not decomposed.
            names: The names of all tensors of the model.
            adapted: The modules that are decomposed.
            tied: True if the output head is the input embedding.
        """
        rest = cls()
        all_modules = set(map(module_of, names))
        for name in changed:
            module, _, parameter = name.rpartition(".")
            if parameter == "bias" and module in adapted:
                rest.biases = True
                rest.saved.add(name)
            elif parameter in ("weight", "bias") and module not in adapted:
                # PEFT saves every module whose name ends in this one's, and then needs the tensors of all of them.
                matches = {m for m in all_modules if m.endswith(module)}
                if not matches & set(adapted):
                    rest.modules |= matches
                    rest.saved.add(name)
        rest.tensors = {n: n for n in names if module_of(n) in rest.modules}
        if rest.biases:
            rest.tensors |= {f"{m}.base_layer.bias": f"{m}.bias" for m in adapted if f"{m}.bias" in names}
        embedding = next((n for n in rest.tensors if is_tied_embedding(n) and n.endswith(".weight")), None)
        if tied and embedding is not None:
            # PEFT copies a saved embedding, and the head would stay tied to the original. So the head is saved too.
            rest.modules.add(OUTPUT_HEAD.removesuffix(".weight"))
            rest.tensors[OUTPUT_HEAD] = embedding
        return rest


def target_names(adapted: Collection[str], names: Mapping[str, Any]) -> list[str]:
    """Return PEFT's target_modules: the names' last parts if these match the adapted modules only, else full names."""
    last_parts = {last_part(m) for m in adapted}
    matches = {m for m in map(module_of, names) if last_part(m) in last_parts}
    return sorted(last_parts if matches == set(adapted) else adapted)


def rank_patterns(ranks: Mapping[str, int]) -> dict[str, int]:
    """Return PEFT's rank_pattern: a regular expression for each module, and its rank."""
    # PEFT takes the first key that matches the end of a name, so longer names must come first.
    return {m.replace(".", r"\."): ranks[m] for m in sorted(ranks, key=lambda m: (-len(m), m))}
