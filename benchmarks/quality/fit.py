"""The training loop of every model here: AdamW, linear warm-up, cosine decay, batches of similar length."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from benchmarks.quality.text import Tokens, pad

Model = PreTrainedModel | PeftModel
E = TypeVar("E")  # an example: tokens, or a pair of an answer to prefer and one to avoid


@dataclass(frozen=True)
class Schedule:
    """How long and how hard to train: passes over the data, peak learning rate, examples per step, warm-up's share."""

    epochs: int
    peak: float
    batch: int = 64
    warmup: float = 0.05


def batches(examples: Sequence[E], size: int, length: Callable[[E], int], rng: random.Random) -> Iterator[list[E]]:
    """One epoch of shuffled batches; each holds examples of similar length, which saves padding."""
    order = sorted(range(len(examples)), key=lambda i: (length(examples[i]), rng.random()))
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    rng.shuffle(chunks)
    for chunk in chunks:
        yield [examples[i] for i in chunk]


def next_token_loss(model: Model, sequences: Sequence[Tokens]) -> torch.Tensor:
    """Mean cross-entropy of the tokens that count."""
    ids, labels = pad(sequences, model.device)
    return model(input_ids=ids, labels=labels).loss


def answer_log_probs(model: Model, sequences: Sequence[Tokens]) -> torch.Tensor:
    """log p(answer | question) of each sequence: the sum over the tokens that count, in the model's dtype."""
    ids, labels = pad(sequences, model.device)
    logits = model(input_ids=ids).logits[:, :-1]
    labels = labels[:, 1:]
    picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (picked * (labels >= 0)).sum(-1)


def fit(
    model: Model,
    epochs: Sequence[Sequence[E]],
    loss: Callable[[Model, list[E]], torch.Tensor],
    length: Callable[[E], int],
    schedule: Schedule,
    seed: int,
) -> dict[str, Any]:
    """Train the parameters that want gradients, in place; `epochs` are the examples of each epoch.

    Same seed, data, thread count and machine: same bits. Returns a record: mean loss of each epoch, steps, examples
    seen, seconds of wall clock and of the processor.
    """
    rng = random.Random(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=schedule.peak, betas=(0.9, 0.98), fused=True)
    total = sum(math.ceil(len(examples) / schedule.batch) for examples in epochs)
    warmup = max(1, int(schedule.warmup * total))

    def factor(step: int) -> float:
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / total)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    wall, processor = time.perf_counter(), time.process_time()
    means = []
    for examples in epochs:
        losses = []
        for batch in batches(examples, schedule.batch, length, rng):
            batch_loss = loss(model, batch)
            batch_loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(batch_loss.item())
        means.append(sum(losses) / len(losses))
    model.eval()
    return {
        "loss": [round(mean, 4) for mean in means],
        "steps": total,
        "examples": sum(len(examples) for examples in epochs),
        "seconds": round(time.perf_counter() - wall, 1),
        "cpu_seconds": round(time.process_time() - processor, 1),
    }
