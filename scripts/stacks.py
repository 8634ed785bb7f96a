"""Stacks layers of a tiny model of every family anew, and checks that each layer computes what its origin computes.

Run it with the package and transformers installed:

    python scripts/stacks.py [--only TEXT]

Each causal language model of transformers is made with six layers, and three stacks of them are merged. A stack must
load, or be refused with a reason: a layer may need the place that it has. In a model that loads, each layer gets what
it is given in a run (hidden states, masks, positions), and the layer of the original model must give the same for it;
masks and positions must be those of the original model.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent))

import families
import torch
import transformers

from resm_kernels.engine import MergeError, merge_checkpoints
from resm_kernels.recipe import RecipeError

LAYERS: Final = 6
MORE_SIZES: Final = {
    **{"mamba_n_heads": 8, "mamba_d_head": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "rotary_dim": 4, "full_attention_interval": 3},
    # RWKV halves hidden states every few layers and doubles weights, by the layer's number, without another result.
    **{"attention_types": [[["global", "local"], LAYERS // 2]], "rescale_every": 0},
}
STACKS: Final = ([(0, 4), (2, 6)], [(0, 3), (1, 6)], [(0, 1), (0, 2), (4, 6)])
NAMES: Final = ("layers", "layer", "h", "blocks", "block")
IDS: Final = torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(0))


@dataclass
class Calls:
    """What each layer of a model was given in a run, and what it gave."""

    model: Any
    given: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    results: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layers = layers_of(self.model)

        def before(i: int, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            self.given.setdefault(i, (arguments, dict(keywords)))

        def after(i: int, result: Any) -> None:
            self.results.setdefault(i, result)

        for i, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(lambda _, a, k, i=i: before(i, a, k), with_kwargs=True)
            layer.register_forward_hook(lambda _, a, r, i=i: after(i, r))
        with torch.no_grad():
            self.model(input_ids=IDS, use_cache=False)


def layers_of(model: Any) -> Any:
    """Return the list of the model's layers: the longest list of modules that has one of the usual names."""
    lists = [m for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and n.split(".")[-1] in NAMES]
    return max(lists, key=len)


def tensors_in(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the tensors in nested arguments, and None where there is none."""
    if value is None or isinstance(value, torch.Tensor):
        yield at, value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from tensors_in(entry, f"{at}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, entry in enumerate(value):
            yield from tensors_in(entry, f"{at}[{i}]")


def differs(first: Any, other: Any) -> str:
    """Return where two results differ; an empty text if they are the same."""
    a, b = dict(tensors_in(first)), dict(tensors_in(other))
    for key in {**a, **b}:
        x, y = a.get(key), b.get(key)
        if (x is None) != (y is None) or (
            x is not None and (x.shape != y.shape or not torch.allclose(x, y, atol=1e-5))
        ):
            return key or "the result"
    return ""


def wrong_layer(out: Any, original: Calls, origins: list[int]) -> str:
    """Return how a layer of a stacked model differs from its origin; an empty text if none does."""
    calls = Calls(out)
    if len(calls.layers) != len(origins):
        return f"{len(calls.layers)} layers instead of {len(origins)}"
    for i, number in enumerate(origins):
        if i not in calls.given and number not in original.given:
            continue  # layers for images, of which there are none
        (arguments, keywords), (first_arguments, first_keywords) = calls.given[i], original.given[number]
        for name in ("hidden_states", "past_key_values", "past_key_value", "layer_past", "prev_topk_indices"):
            first_keywords = {k: v for k, v in first_keywords.items() if k != name}
        shared = {k: keywords.get(k) for k in first_keywords}
        if where := differs(shared, first_keywords) or differs(arguments[1:], first_arguments[1:]):
            return f"layer {i} is not given what layer {number} is: {where}"
        with torch.no_grad():
            again = copy.deepcopy(original.layers[number])(*arguments, **keywords)
        if differs(again, calls.results[i]):
            return f"layer {i} does not compute what layer {number} computes"
    return ""


def try_stacks(config_class: Any, model_class: Any) -> list[str]:
    """Return what becomes of each stack: "same", the reason of a refusal, or a text that begins with FAIL."""
    folder = Path(tempfile.mkdtemp(prefix="stacks-"))
    results = []
    try:
        config = families.tiny_config(config_class)
        with torch.device("meta"):
            count = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
        if count > families.LARGEST:
            return [f"not made: it has {count / 1e6:.0f} M parameters"]
        torch.manual_seed(0)
        model = model_class(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder / "model")
        original = Calls(model_class.from_pretrained(folder / "model", dtype=torch.float32).eval())
        if len(original.layers) != LAYERS:
            return [f"not made: it has {len(original.layers)} layers"]
        for stack in STACKS:
            slices = [{"sources": [{"model": str(folder / "model"), "layer_range": list(s)}]} for s in stack]
            out = folder / "out"
            try:
                merge_checkpoints(
                    {"merge_method": "passthrough", "slices": slices}, out, overwrite=True, model_card=False
                )
            except (MergeError, RecipeError) as error:
                results.append("refused: " + str(error).replace(str(folder), ""))
                continue
            try:
                loaded, info = model_class.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
                kinds = [k for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[k]]
                origins = [number for first, last in stack for number in range(first, last)]
                reason = f"{kinds}" if kinds else wrong_layer(loaded.eval(), original, origins)
            except Exception as error:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            results.append(f"FAIL {reason[:160]}" if reason else "same")
    except Exception as error:
        return [*results, f"not made: {type(error).__name__}: {' '.join(str(error).split())[:100]}"]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return results


def deeper() -> None:
    """Make the tiny models of the other script with six layers."""
    for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"):
        families._SIZES[key] = LAYERS
    families._SIZES.update(MORE_SIZES)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="only families whose name contains this text")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    deeper()
    failed = 0
    for config_class, model_class in families.KINDS["causal"].items():
        if arguments.only in config_class.model_type:
            results = try_stacks(config_class, model_class[0] if isinstance(model_class, tuple) else model_class)
            failed += any(result.startswith("FAIL") for result in results)
            print(f"{config_class.model_type}: {' | '.join(results)}", flush=True)
    print(f"{failed} families with a stack that is wrong")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
