"""A seed of the quality benchmark with untrained models, and scores that are made up."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.quality.candidates import DPO, LORA, MIXES, SFT
from benchmarks.quality.merging import StateDict, digest
from benchmarks.quality.text import build_tokenizer
from benchmarks.quality.world import KINDS_OF, World

KINDS = [kind for kinds in KINDS_OF.values() for kind in kinds]


def tiny(vocabulary: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def write_seed(folder: Path, seed: int) -> None:
    """All models of a seed, untrained: the base, and noise around it."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(World(seed))
    base = tiny(len(tokenizer)).to(torch.bfloat16)
    for name in ("base", *SFT, *DPO, *MIXES):
        model = tiny(len(tokenizer)).to(torch.bfloat16)
        noise = 0.0 if name == "base" else 0.01
        for tensor, start in zip(model.parameters(), base.parameters(), strict=True):
            tensor.data.copy_(start + noise * torch.randn(start.shape))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name in LORA:
        adapted = get_peft_model(
            LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32),
            LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False),
        )
        adapted.save_pretrained(folder / name)


def made_up(model: StateDict, split: str) -> Mapping[str, float]:
    """Scores that depend on the model's bits and on nothing else."""
    rng = random.Random(digest(model) + split)
    kinds = {kind: 100 * rng.random() for kind in KINDS}
    dimensions = {name: sum(kinds[k] for k in members) / len(members) for name, members in KINDS_OF.items()}
    return dimensions | {"average": sum(dimensions.values()) / 3, "worst": min(dimensions.values())} | kinds


class Spy:
    """A stand-in for `Asker` that records each question in order."""

    def __init__(self, patience: int = 10**6) -> None:
        self.asked: list[tuple[str, str]] = []
        self.patience = patience

    def __call__(self, model: StateDict, split: str) -> Mapping[str, float]:
        if len(self.asked) == self.patience:
            raise KeyboardInterrupt
        self.asked.append((digest(model), split))
        return made_up(model, split)


class SeededSpy(Spy):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def __call__(self, model: StateDict, split: str) -> Mapping[str, float]:
        return made_up(model, f"{split}{self.seed}")
