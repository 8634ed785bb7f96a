"""LoRA experts (Hu et al., 2021): adapters of rank 8 on every projection, trained and saved with peft."""

from __future__ import annotations

from typing import Final

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

RANK: Final = 8
PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def with_adapter(base: PreTrainedModel) -> PeftModel:
    """The base, frozen, with a fresh adapter: scale 2 (alpha 16), no dropout; the caller seeds torch."""
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=list(PROJECTIONS), lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    return get_peft_model(base, config)
