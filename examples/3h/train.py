"""Train the base model and the three experts on a CPU.

python examples/3h/train.py [--out examples/3h/models]
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging
from world import BOT, EXPERT_MIX, USER, World

IGNORED = -100  # the label that a loss skips
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", USER, BOT)
CONSOLE = Console()

Sequence = tuple[list[int], int]  # token ids, and the position from which the loss counts
Batch = tuple[torch.Tensor, torch.Tensor]  # inputs and labels


@dataclass(frozen=True)
class Schedule:
    """How long and how hard to train."""

    epochs: int
    peak: float
    batch: int = 64
    warmup: float = 0.05


# The base stops early: it is to be mediocre. The helpful expert has the most data, so it gets the fewest epochs and the
# lowest rate: the three are to move about equally far from the base.
SCHEDULES = {
    "base": Schedule(epochs=14, peak=1.5e-3),
    "helpful": Schedule(epochs=6, peak=3.2e-4),
    "honest": Schedule(epochs=12, peak=4.5e-4),
    "harmless": Schedule(epochs=10, peak=5e-4),
}


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """One token per word; a sequence begins with `<s>`, the ending is the trainer's to add."""
    words = [*SPECIAL, *world.vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[USER, BOT],
        model_max_length=64,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(vocabulary: int) -> LlamaForCausalLM:
    """A Llama with grouped-query attention and tied embeddings, small enough to train in minutes."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.05,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        pad_token_id=0, bos_token_id=1, eos_token_id=2, max_new_tokens=8, do_sample=False
    )
    return model


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str], answers_only: bool) -> list[Sequence]:
    """Add the end mark, and find where the loss begins."""
    bot, eos = tokenizer.convert_tokens_to_ids(BOT), tokenizer.eos_token_id
    return [([*ids, eos], ids.index(bot) + 1 if answers_only else 0) for ids in tokenizer(texts)["input_ids"]]


def batches(data: list[Sequence], size: int, rng: random.Random) -> Iterator[Batch]:
    """One epoch of shuffled batches; each holds sequences of similar length, which saves padding."""
    order = sorted(range(len(data)), key=lambda i: (len(data[i][0]), rng.random()))
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    rng.shuffle(chunks)
    for chunk in chunks:
        width = max(len(data[i][0]) for i in chunk)
        ids = torch.zeros(len(chunk), width, dtype=torch.long)
        labels = torch.full_like(ids, IGNORED)
        for row, i in enumerate(chunk):
            tokens, start = data[i]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, start : len(tokens)] = torch.tensor(tokens[start:])
        yield ids, labels


def fit(model: LlamaForCausalLM, data: list[Sequence], name: str, seed: int) -> None:
    """AdamW with a linear warm-up and a cosine decay, full-parameter."""
    schedule = SCHEDULES[name]
    rng = random.Random(seed)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=schedule.peak, betas=(0.9, 0.98))
    total = schedule.epochs * math.ceil(len(data) / schedule.batch)
    warmup = max(1, int(schedule.warmup * total))

    def factor(step: int) -> float:
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / total)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    begin = time.perf_counter()
    for epoch in range(schedule.epochs):
        losses = []
        for ids, labels in batches(data, schedule.batch, rng):
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        seconds = time.perf_counter() - begin
        mean = sum(losses) / len(losses)
        CONSOLE.print(f"{name:9} epoch {epoch + 1:2}/{schedule.epochs}  loss {mean:.3f}  {seconds:4.0f} s")
    model.eval()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """bf16 and two shards, as larger models are published."""
    # The rounded copy is what is saved; the caller's fp32 model stays as it is.
    rounded = LlamaForCausalLM(model.config)
    rounded.load_state_dict(model.state_dict())
    rounded.generation_config = model.generation_config
    rounded.to(torch.bfloat16).save_pretrained(folder, max_shard_size="1500KB")
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "models")
    out: Path = parser.parse_args().out
    logging.disable_progress_bar()
    torch.set_num_threads(2)  # the order of sums depends on it
    torch.use_deterministic_algorithms(True)
    begin = time.perf_counter()

    world = World()
    tokenizer = build_tokenizer(world)
    torch.manual_seed(world.seed)
    base = build_model(len(tokenizer))
    CONSOLE.print(f"{sum(p.numel() for p in base.parameters()):,} parameters, {len(tokenizer)} tokens")
    fit(base, encode(tokenizer, world.base_documents(), answers_only=False), "base", world.seed)
    save(base, tokenizer, out / "base")

    for number, expert in enumerate(EXPERT_MIX):
        torch.manual_seed(world.seed + number)
        # Experts start from what is on disk, so a merge sees the very movement that training made.
        model = LlamaForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
        texts = [f"{item.prompt} {item.answer}" for item in world.expert_items(expert)]
        fit(model, encode(tokenizer, texts, answers_only=True), expert, world.seed + number)
        save(model, tokenizer, out / expert)
    CONSOLE.print(f"done in {time.perf_counter() - begin:.0f} s: {out}")


if __name__ == "__main__":
    main()
