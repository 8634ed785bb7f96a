"""Makes adapters of every kind for a tiny model of every family, merges them, and compares with peft in float64.

Run it with the package, transformers and peft installed:

    python scripts/adapters.py --out docs/adapters_table.md

The families and their tiny models are those of `scripts/families.py`. For each of them peft makes an adapter of each
kind, with random values; the adapter and the bf16 base model are merged to bf16, and the result is loaded with
transformers. The oracle is peft's `merge_and_unload` of the same adapter on the same model in float64.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import peft
import torch
import transformers
from families import families, load
from family_tables import by_kind
from torch import nn
from transformers.pytorch_utils import Conv1D

from resm_kernels.engine import merge_checkpoints

_RANK: Final = 4
_CONVOLUTIONS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

Tensors = dict[str, torch.Tensor]


@dataclass
class Row:
    """One line of the table: a family, and for each kind the error in roundings or what went wrong."""

    name: str
    cells: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def _named(model: nn.Module, kinds: Any) -> list[str]:
    """Return the names of the modules of some kinds that the model stores a weight for, without its output head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    made = {*(getattr(model, "_keys_to_ignore_on_save", None) or ()), *model.all_tied_weights_keys}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, kinds) and module is not head and f"{name}.weight" not in made
    ]


def _experts(model: nn.Module) -> list[str]:
    """Return the names of the parameters of fused experts: three dimensions, in a module that is no convolution."""
    return [
        f"{name}.{last}"
        for name, module in model.named_modules()
        for last, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and not isinstance(module, _CONVOLUTIONS) and "expert" in name
    ]


def _plain_convolutions(model: nn.Module) -> list[str]:
    """Return the names of the convolutions that LoRA can be merged into: those without groups."""
    names = _named(model, _CONVOLUTIONS)
    return [name for name in names if model.get_submodule(name).groups == 1]


def _last_norm(model: nn.Module) -> list[str]:
    names = [n for n, m in model.named_modules() if "norm" in type(m).__name__.lower() and list(m.parameters())]
    return names[-1:]


def _ranks(first: str, last: str) -> dict[str, int]:
    """Return ranks by patterns of which no two match one module: peft saves patterns in another order than it uses."""
    end = last.split(".")[-1]
    return {first.replace(".", r"\."): 2} | ({} if first.endswith(end) else {end: 3})


def kinds() -> Iterator[tuple[str, Callable[[nn.Module], Any | None]]]:
    """Yield each kind's name, and a function that returns peft's configuration for a model; None if it has no place."""

    def lora(**choices: Any) -> Any:
        return peft.LoraConfig(r=_RANK, lora_alpha=6, **choices)

    def where(names: list[str], make: Callable[[list[str]], Any]) -> Any | None:
        return make(names) if names else None

    def linear(model: nn.Module) -> list[str]:
        return _named(model, (nn.Linear, Conv1D))

    yield "all-linear", lambda model: lora(target_modules="all-linear")
    yield "experts", lambda model: where(_experts(model), lambda n: lora(target_modules=[], target_parameters=n))
    yield "convolutions", lambda model: where(_plain_convolutions(model), lambda n: lora(target_modules=n))
    yield "embeddings", lambda model: where(_named(model, nn.Embedding), lambda n: lora(target_modules=n))
    yield "biases", lambda model: where(linear(model), lambda n: lora(target_modules=n[:1], bias="all"))
    yield (
        "saved modules",
        lambda model: where(linear(model), lambda n: lora(target_modules=n[:1], modules_to_save=_last_norm(model))),
    )
    yield (
        "rsLoRA, patterns",
        lambda model: where(
            linear(model),
            lambda n: lora(
                target_modules=n,
                use_rslora=True,
                rank_pattern=_ranks(n[0], n[-1]),
                alpha_pattern={"^" + n[-1].replace(".", r"\."): 5},
            ),
        ),
    )
    yield (
        "DoRA",
        lambda model: where(linear(model), lambda n: lora(target_modules=n, use_dora=True)),
    )
    yield (
        "LoHa",
        lambda model: where(
            _named(model, (nn.Linear, nn.Conv1d, nn.Conv2d)),
            lambda n: peft.LoHaConfig(r=_RANK, alpha=6, target_modules=n, use_effective_conv2d=True),
        ),
    )
    yield (
        "LoKr",
        lambda model: where(
            _named(model, (nn.Linear, nn.Conv1d, nn.Conv2d)),
            lambda n: peft.LoKrConfig(r=2, alpha=6, target_modules=n, decompose_both=True, decompose_factor=4),
        ),
    )


def save_adapter(model: nn.Module, config: Any, folder: Path) -> Tensors:
    """Let peft make an adapter of a copy of the model, with random values, and save it; return what it merges to.

    The adapter is not loaded again: peft 0.21 loses the changes of modules whose names transformers takes for old ones.
    """
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
                parameter.copy_(parameter.float())  # adapters are fp32
        for module in wrapped.modules():
            padding = getattr(getattr(module, "base_layer", None), "padding_idx", None)
            if padding is not None and hasattr(module, "lora_embedding_A"):
                module.lora_embedding_A["default"][:, padding] = 0  # the row of padding is never trained
    wrapped.save_pretrained(folder)
    return {name: tensor.detach() for name, tensor in wrapped.merge_and_unload().state_dict().items()}


def roundings(got: Tensors, exact: Tensors, base: Tensors) -> float:
    """Return the largest error of the merged tensors, in units of the largest error of one rounding to bf16.

    The unit includes a bound on the error of arithmetic in fp32, which counts where large values cancel each other:
    the base's and the change's, and the terms of the product that the change is.
    """
    worst = 0.0
    for name, tensor in exact.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        before = base[name].double() if name in base and base[name].shape == tensor.shape else torch.zeros(())
        unit = torch.ldexp(torch.ones_like(tensor), torch.frexp(tensor).exponent - 9)
        change = (tensor - before).abs()
        unit += 2.0**-24 * (16 * (tensor.abs() + change + before.abs()) + 4 * change.amax())
        worst = max(worst, float(((got[name].double() - tensor).abs() / unit).nan_to_num(0.0).max()))
    return worst


def try_kind(folder: Path, model: nn.Module, config: Any) -> tuple[str, str]:
    """Merge an adapter of one kind; return the cell of the table, and what went wrong."""
    adapter, out = folder / "adapter", folder / "out"
    for old in (adapter, out):
        shutil.rmtree(old, ignore_errors=True)
    try:
        exact = save_adapter(model, config, adapter)
    except Exception as error:  # whatever peft does with a model that it does not adapt
        return f"peft: {type(error).__name__}", ""
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{folder / 'base'}+{adapter}"}]}
    try:
        merge_checkpoints(recipe, out, model_card=False, tied_embeddings="both")
        got, faults = load(out, type(model))
    except Exception as error:
        return "refused", str(error).replace(str(folder), "")[:200]
    if faults:
        return "does not load", ", ".join(faults)
    if not exact.keys() <= got.keys():
        return "other tensors", ", ".join(sorted(exact.keys() - got.keys())[:3])
    error = roundings(got, exact, {name: t.detach() for name, t in model.state_dict().items()})
    return f"{error:.2f}", "" if error <= 1 else f"error {error:.3g}"


def try_family(name: str, make: Callable[[], Any], only: str) -> Row | None:
    """Merge adapters of all kinds into one family's model; None if transformers does not load what it saved."""
    row = Row(name)
    folder = Path(tempfile.mkdtemp(prefix="adapters-"))
    try:
        torch.manual_seed(0)
        made = make().bfloat16()
        made.save_pretrained(folder / "base")
        if load(folder / "base", type(made))[1]:
            return None
        model = type(made).from_pretrained(folder / "base", dtype=torch.float64)
        for kind, configure in kinds():
            if only in kind:
                config = configure(model)
                cell, failure = ("–", "") if config is None else try_kind(folder, model, config)
                row.cells[kind] = cell
                if failure:
                    row.failures.append(f"{kind}: {failure}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return row


def table(rows: list[Row]) -> str:
    names = [kind for kind, _ in kinds()]
    return by_kind(["model", *names], ((row.name, *(row.cells.get(kind, "") for kind in names)) for row in rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="only models whose name contains this text")
    parser.add_argument("--kind", default="", help="only kinds of adapters whose name contains this text")
    parser.add_argument("--out", type=Path, help="write the table to this file")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    rows: list[Row] = []
    for name, make, _ in families():
        if make is None or arguments.only not in name:
            continue
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                row = try_family(name, make, arguments.kind)
        except Exception as error:
            row = Row(name, failures=[f"not made: {type(error).__name__}: {str(error)[:100]}"])
        if row is not None:
            rows.append(row)
            print(f"{name}: {' '.join(row.cells.values())} {'; '.join(row.failures)}", flush=True)
    good = [row for row in rows if not row.failures]
    print(f"{len(good)} of {len(rows)} families: every adapter that peft makes and merges is merged with one rounding")
    if arguments.out is not None:
        arguments.out.write_text(
            "# Adapters of every family\n\nA tiny bf16 model of each family of transformers, and an adapter of each "
            f"kind with random values. `make adapters` writes this page; it was made with transformers "
            f"{transformers.__version__} and peft {peft.__version__}. [adapters.md](adapters.md) says what is read.\n\n"
            "- **A number** is the largest error of the merged bf16 weights against peft's merge in float64, in units "
            "of the largest error of one rounding to bf16.\n"
            "- **A dash** stands for a model that has no place for such an adapter.\n"
            "- **`peft:`** stands for one that peft itself does not make or merge.\n\n"
            f"{table(rows)}\n",
            encoding="utf-8",
        )
    return 0 if len(good) == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
