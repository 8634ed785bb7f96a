"""Train everything the benchmark compares: base, experts by three paradigms, data mixes; for several seeds.

python -m benchmarks.quality.train --size small --seeds 0 1 2 3 4 --root build/quality

Folders are <root>/<size>/seed-<n>/<model>, in bf16, two shards each; a LoRA expert is a peft adapter. Beside the
weights lies train.json: settings, losses, steps, seconds. A folder that is there is not trained again, and it is there
only when whole: it is written aside and renamed. Two processes of one thread each work side by side on a CPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from transformers import LlamaForCausalLM
from transformers.utils import logging

from benchmarks.quality.dpo import ANCHOR, BETA, pair_length, pair_loss, pairs
from benchmarks.quality.fit import Model, Schedule, fit, next_token_loss
from benchmarks.quality.lora import RANK, with_adapter
from benchmarks.quality.mixes import MIDDLING, SHARES, draw, keep_middling
from benchmarks.quality.sizes import SIZES, build_model, move
from benchmarks.quality.text import Tokens, build_tokenizer, encode_answers, encode_documents, token_count
from benchmarks.quality.world import EXPERT_MIX, KINDS_OF, Dimension, World

LOG: Final = "train.json"
DIMENSIONS: Final[tuple[Dimension, ...]] = tuple(KINDS_OF)
# Chosen at `small` on validation, in world 0. The base stops early: it is to be mediocre. Experts get as few epochs as
# make each clearly the best of its dimension.
SCHEDULES: Final[dict[str, Schedule]] = {
    "base": Schedule(epochs=14, peak=1.5e-3),
    "helpful": Schedule(epochs=5, peak=8e-4),
    "honest": Schedule(epochs=6, peak=7e-4),
    "harmless": Schedule(epochs=6, peak=5e-4),
    "helpful-dpo": Schedule(epochs=3, peak=5e-4),
    "honest-dpo": Schedule(epochs=3, peak=4e-4),
    "harmless-dpo": Schedule(epochs=3, peak=4e-4),
    "helpful-lora": Schedule(epochs=5, peak=3e-3),
    "honest-lora": Schedule(epochs=6, peak=3e-3),
    "harmless-lora": Schedule(epochs=6, peak=3e-3),
    **{mix: Schedule(epochs=6, peak=5e-4) for mix in SHARES},
}
MODELS: Final = tuple(SCHEDULES)


def settings(model: str, size: str, seed: int) -> dict[str, Any]:
    """What decides a model's weights beside the code, as its record has it."""
    decisive: dict[str, Any] = {
        "model": model,
        "size": size,
        "seed": seed,
        "schedule": asdict(schedule_of(model, size)),
    }
    dimension, _, paradigm = model.partition("-")
    if dimension in EXPERT_MIX:
        decisive["questions"] = EXPERT_MIX[dimension]
    if paradigm == "dpo":
        decisive |= {"beta": BETA, "anchor": ANCHOR}
    if paradigm == "lora":
        decisive["rank"] = RANK
    if model in SHARES:
        decisive["shares"] = SHARES[model]
        decisive["questions"] = EXPERT_MIX
        decisive["budget"] = {d: SCHEDULES[d].epochs for d in DIMENSIONS}
    if model == "mix-filtered":
        decisive["middling"] = list(MIDDLING)
    return decisive


def expertise(model: str) -> tuple[Dimension, str]:
    """The dimension and the paradigm ("", "dpo" or "lora") of an expert."""
    stem, _, paradigm = model.partition("-")
    return next(dimension for dimension in DIMENSIONS if dimension == stem), paradigm


def schedule_of(model: str, size: str) -> Schedule:
    """The model's schedule, its rate scaled to the size."""
    chosen = SCHEDULES[model]
    return Schedule(chosen.epochs, chosen.peak * SIZES[size].rate, chosen.batch, chosen.warmup)


def is_done(folder: Path, expected: dict[str, Any]) -> bool:
    """Whether the folder holds this model; one that was trained with other settings is an error."""
    if not folder.exists():
        return False
    if not (folder / LOG).is_file():
        raise ValueError(f"{folder} has no {LOG}: it is not from here; remove it, or choose another --root")
    trained_with = json.loads((folder / LOG).read_text())["settings"]
    if trained_with != expected:
        differ = ", ".join(sorted(k for k in {*trained_with, *expected} if trained_with.get(k) != expected.get(k)))
        raise ValueError(f"{folder} was trained with other settings ({differ}); remove it to train it anew")
    return True


def save(model: Model, folder: Path, record: dict[str, Any], world: World) -> None:
    """Weights, tokenizer and record; written aside and renamed, so that a folder under its own name is whole.

    A full model is saved in bf16 and two shards, as larger ones are published; an adapter in fp32, as peft does.
    """
    aside = folder.with_name(f".{folder.name}-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    if isinstance(model, LlamaForCausalLM):
        size = 2 * sum(p.numel() for p in model.parameters())
        # The rounded copy is what is saved; the caller's fp32 model stays as it is.
        rounded = LlamaForCausalLM(model.config)
        rounded.load_state_dict(model.state_dict())
        rounded.generation_config = model.generation_config
        move(rounded, dtype=torch.bfloat16).save_pretrained(aside, max_shard_size=int(0.58 * size))
    else:
        model.save_pretrained(str(aside))
    build_tokenizer(world).save_pretrained(aside)
    (aside / LOG).write_text(json.dumps(record, indent=1) + "\n")
    aside.rename(folder)


def train(root: Path, size: str, seed: int, name: str, device: str = "cpu") -> dict[str, Any]:
    """Train one model into its folder (all but the base need the base's), and return its record."""
    logging.disable_progress_bar()
    torch.use_deterministic_algorithms(True)
    folder = root / size / f"seed-{seed}" / name
    expected = settings(name, size, seed)
    if is_done(folder, expected):
        return json.loads((folder / LOG).read_text())
    begin = time.process_time()
    world = World(seed)
    tokenizer = build_tokenizer(world)
    schedule = schedule_of(name, size)
    order = seed * len(MODELS) + MODELS.index(name)
    torch.manual_seed(order)
    model: Model
    if name == "base":
        model = move(build_model(SIZES[size], len(tokenizer)), device=device)
        documents = encode_documents(tokenizer, world.base_documents())
        log = fit(model, [documents] * schedule.epochs, next_token_loss, token_count, schedule, order)
    else:
        # All start from what is on disk, so a merge sees the very movement that training made.
        base = move(LlamaForCausalLM.from_pretrained(folder.with_name("base"), dtype=torch.float32), device=device)
        model = base
        data: dict[Dimension, list[Tokens]] = {
            d: encode_answers(tokenizer, [(item, item.answer) for item in world.expert_items(d)]) for d in DIMENSIONS
        }
        if name in SHARES:
            budget = sum(SCHEDULES[d].epochs * len(data[d]) for d in DIMENSIONS)
            if name == "mix-filtered":
                data = {d: keep_middling(base.eval(), examples) for d, examples in data.items()}
            epochs = draw(data, SHARES[name], budget, schedule.epochs, seed)
            log = fit(model, epochs, next_token_loss, token_count, schedule, order)
        else:
            dimension, paradigm = expertise(name)
            if paradigm == "dpo":
                preferred = pairs(world, dimension, base.eval(), tokenizer)
                log = fit(base, [preferred] * schedule.epochs, pair_loss(), pair_length, schedule, order)
            else:
                model = with_adapter(base) if paradigm == "lora" else base
                log = fit(model, [data[dimension]] * schedule.epochs, next_token_loss, token_count, schedule, order)
    record = {
        "settings": expected,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        **log,
        "whole_cpu_seconds": round(time.process_time() - begin, 1),
    }
    save(model, folder, record, world)
    return record


def train_all(
    root: Path, size: str, seeds: Sequence[int], names: Sequence[str], processes: int, device: str, console: Console
) -> None:
    """Train what is missing; a seed's other models begin when its base is there."""
    context = multiprocessing.get_context("spawn")
    missing = {
        (seed, name): settings(name, size, seed)
        for seed in seeds
        for name in names
        if not is_done(root / size / f"seed-{seed}" / name, settings(name, size, seed))
    }
    without = sorted({s for s, n in missing if n != "base" and not (root / size / f"seed-{s}" / "base").exists()})
    if "base" not in names and without:
        raise ValueError(f"the base of seed {without} is not trained: add base to --models")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        running: dict[Future[dict[str, Any]], tuple[int, str]] = {}

        def start(chosen: Sequence[tuple[int, str]]) -> None:
            for seed, name in chosen:
                running[pool.submit(train, root, size, seed, name, device)] = (seed, name)

        bases = [(seed, name) for seed, name in missing if name == "base"]
        start(bases)
        start([(seed, name) for seed, name in missing if name != "base" and (seed, "base") not in bases])
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                seed, name = running.pop(future)
                record = future.result()
                console.print(
                    f"{size} seed {seed} {name:14} {record['steps']:5} steps  loss {record['loss'][-1]:6.3f}  "
                    f"{record['cpu_seconds']:6.1f} s of processor"
                )
                if name == "base":
                    start([(s, n) for s, n in missing if s == seed and n != "base"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="default: all")
    parser.add_argument("--root", type=Path, default=Path("build/quality"))
    parser.add_argument("--processes", type=int, default=2, help="how many to train side by side, a thread each")
    parser.add_argument("--device", default="cpu", help="where to train, for example cuda")
    options = parser.parse_args()
    console = Console(width=120)
    try:
        train_all(options.root, options.size, options.seeds, options.models, options.processes, options.device, console)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
