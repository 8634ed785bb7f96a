"""How an extracted adapter names what it holds, in the terms PEFT looks modules up by."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

HEAD: Final = "lm_head.weight"


@dataclass
class Rest:
    """How changed tensors that are not decomposed go into the adapter.

    Attributes:
        modules: PEFT's modules_to_save.
        tensors: Name in the adapter → tensor of the fine-tuned model.
        saved: Those of the changed tensors that are among them.
        biases: True if some are biases of decomposed modules.
    """

    modules: set[str] = field(default_factory=set)
    tensors: dict[str, str] = field(default_factory=dict)
    saved: set[str] = field(default_factory=set)
    biases: bool = False

    @classmethod
    def of(cls, changed: Collection[str], names: Mapping[str, Any], adapted: Collection[str], tied: bool) -> Rest:
        rest = cls()
        every = {n.rpartition(".")[0] for n in names}
        for name in changed:
            module, _, parameter = name.rpartition(".")
            if parameter == "bias" and module in adapted:
                rest.biases = True
                rest.saved.add(name)
            elif parameter in ("weight", "bias") and module not in adapted:
                # PEFT takes every module whose name ends so, and then needs all their tensors.
                alike = {m for m in every if m.endswith(module)}
                if not alike & set(adapted):
                    rest.modules |= alike
                    rest.saved.add(name)
        rest.tensors = {n: n for n in names if n.rpartition(".")[0] in rest.modules}
        if rest.biases:
            rest.tensors |= {f"{m}.base_layer.bias": f"{m}.bias" for m in adapted if f"{m}.bias" in names}
        if tied and (
            found := [n for n in rest.tensors if last_part(n.removesuffix(".weight")) in ("embed_tokens", "wte")]
        ):
            # PEFT gives the embedding a copy of its own, from which the head would no longer follow.
            rest.modules.add("lm_head")
            rest.tensors[HEAD] = found[0]
        return rest


def target_names(adapted: Collection[str], names: Mapping[str, Any]) -> list[str]:
    """PEFT's target_modules: last parts of the names if these mean exactly the adapted modules, else full names."""
    ends = {last_part(m) for m in adapted}
    meant = {n.rpartition(".")[0] for n in names if last_part(n.rpartition(".")[0]) in ends}
    return sorted(ends if meant == set(adapted) else adapted)


def rank_patterns(ranks: Mapping[str, int]) -> dict[str, int]:
    # The first key that matches the end of a name counts: longer names go first.
    return {m.replace(".", r"\."): ranks[m] for m in sorted(ranks, key=lambda m: (-len(m), m))}


def last_part(module: str) -> str:
    """The name that follows the last dot."""
    return module.rsplit(".", 1)[-1]
