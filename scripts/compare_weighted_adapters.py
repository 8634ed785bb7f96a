"""Compares add_weighted_adapter of peft and of this library with the weighted sum of the adapters' changes in float64.

A tiny Llama gets two adapters of each kind. The change of an adapter is what peft's own merge_and_unload makes of it,
less the base model. The error is ‖got − expected‖_F/‖expected‖_F over all weights. Of `cat` and of `svd` at full rank
Σ w_t·Δ_t is expected. peft defines `linear` by its factors: of it is expected what that definition gives for A, B and
the scale of each adapter.

    python scripts/compare_weighted_adapters.py [--out docs/merge_lora.md]
"""

from __future__ import annotations

import argparse
import copy
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from resm_kernels.peft import add_weighted_adapter

MODULES: Final = ["q_proj", "v_proj", "up_proj", "down_proj"]
KINDS: Final[dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "plain LoRA": ({}, {}),
    "rsLoRA": ({"use_rslora": True}, {"use_rslora": True}),
    "rsLoRA and plain": ({"use_rslora": True}, {}),
    "plain and rsLoRA": ({}, {"use_rslora": True}),
    "DoRA": ({"use_dora": True}, {"use_dora": True}),
    "rank and alpha patterns": ({"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 16}},) * 2,
    "patterns that differ": ({"rank_pattern": {"up_proj": 2}}, {"rank_pattern": {"down_proj": 6}}),
    "ranks 4 and 6": ({}, {"r": 6}),
    "other modules": ({"target_modules": ["q_proj", "up_proj"]}, {"target_modules": ["up_proj", "v_proj"]}),
}
TYPES: Final = ("linear", "cat", "svd")
WEIGHTS: Final = (0.7, -0.4)
FULL_RANK: Final = 16
BEGIN: Final = "<!-- scripts/compare_weighted_adapters.py -->"
END: Final = "<!-- end -->"


def make_model(kinds: tuple[dict[str, Any], dict[str, Any]]) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double()
    defaults = {"r": 4, "lora_alpha": 6, "target_modules": MODULES}
    wrapped = get_peft_model(model, LoraConfig(**defaults | kinds[0]), adapter_name="a")
    wrapped.add_adapter("b", LoraConfig(**defaults | kinds[1]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return wrapped.double()


def change(model: Any, adapter: str) -> dict[str, Tensor]:
    """What peft's merge of one adapter changes in each weight."""
    merged = copy.deepcopy(model)
    merged.set_adapter(adapter)
    before = {n: m.get_base_layer().weight.detach().clone() for n, m in merged.named_modules() if hasattr(m, "lora_A")}
    after = merged.merge_and_unload(adapter_names=[adapter]).state_dict()
    short = {name: name.removeprefix("base_model.model.") for name in before}
    return {short[name]: after[f"{short[name]}.weight"] - weight for name, weight in before.items()}


def expected(model: Any, kind: str) -> dict[str, Tensor]:
    if kind != "linear":
        parts = [change(model, adapter) for adapter in ("a", "b")]
        return {name: sum(w * p[name] for w, p in zip(WEIGHTS, parts, strict=True)) for name in parts[0]}  # type: ignore[misc]
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A") and layer.lora_A:
            a: Any = 0
            b: Any = 0
            for adapter, weight in zip(("a", "b"), WEIGHTS, strict=True):
                if adapter in layer.lora_A:
                    scaled = weight * layer.scaling[adapter]
                    a = a + math.copysign(math.sqrt(abs(scaled)), scaled) * layer.lora_A[adapter].weight.detach()
                    b = b + math.sqrt(abs(scaled)) * layer.lora_B[adapter].weight.detach()
            found[name.removeprefix("base_model.model.")] = b @ a
    return found


def error(kinds: tuple[dict[str, Any], dict[str, Any]], kind: str, add: Callable[..., Any]) -> str:
    model = make_model(kinds)
    try:
        goal = expected(model, kind)
    except RuntimeError:
        return "–"  # factors of different ranks have no sum
    choices: dict[str, Any] = {"svd_rank": FULL_RANK} if kind == "svd" else {}
    if kind == "svd" and any(k.get("use_dora") for k in kinds):
        choices = {"svd_rank": 32}
    if kind in ("linear", "cat") and any(k.get("use_dora") for k in kinds):
        goal = expected(model, "svd")
    try:
        add(model, ["a", "b"], list(WEIGHTS), "merged", kind, **choices)
    except (ValueError, RuntimeError) as problem:
        return "refused" if isinstance(problem, ValueError) else "fails"
    got = change(model, "merged")
    difference = math.sqrt(sum(float((got[n] - goal[n]).square().sum()) for n in goal))
    value = difference / math.sqrt(sum(float(g.square().sum()) for g in goal.values()))
    return "0" if value < 1e-12 else f"{value:.1e}" if value < 1e-3 else f"{value:.0%}"


def ours(model: Any, *args: Any, **choices: Any) -> None:
    add_weighted_adapter(model, *args, **choices)


def theirs(model: Any, *args: Any, **choices: Any) -> None:
    model.add_weighted_adapter(*args, **choices)


def table() -> str:
    lines = ["| adapters | type | peft | here |", "|---|---|---|---|"]
    for name, kinds in KINDS.items():
        for kind in TYPES:
            cells = [error(kinds, kind, way) for way in (theirs, ours)]
            lines.append(f"| {name} | `{kind}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the table into this document, between its marks")
    out: Mapping[str, Any] = vars(parser.parse_args())
    warnings.simplefilter("ignore")
    text = table()
    print(text)
    if (file := out["out"]) is not None:
        before, _, rest = file.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        file.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
