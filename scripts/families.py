"""Makes a tiny model of every family that transformers can build, merges it by five methods, and loads the results.

Run it with the package, transformers and (for the last column) mergekit installed:

    python scripts/families.py --out docs/architectures.md --mergekit

A family is a kind of model and a configuration class of transformers. Its sizes are set by the names of the
configuration's entries, so that new versions of transformers bring their families along. Families that do not get small
in this way are listed and not merged. A second table has models as they lie on the hub: old names, buffers, copies. A
third has quantised formats.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from expected_roles import wrong_roles
from family_tables import by_kind, left_out, table
from quantised_layouts import Quantise, quantised_layouts, store_quantised
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from resm_kernels.engine import merge_checkpoints

METHODS: Final = ("linear", "task_arithmetic", "ties", "dare_ties", "resm")
KINDS: Final = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    "encoder-decoder": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING,
    "image and text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
}
LARGEST: Final = 2_000_000
"""The most parameters of a model that is small."""

_WIDTH, _INNER, _LAYERS, _HEADS = 32, 48, 2, 4
_SIZES: Final = {
    "vocab_size": 96,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size"), _WIDTH),
    **dict.fromkeys(("word_embed_proj_dim",), _WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), _INNER),
    **dict.fromkeys(("n_inner", "hidden_dim", "ffn_hidden_size"), _INNER),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"), _LAYERS),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "depth"), _LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), _HEADS),
    "decoder_attention_heads": _HEADS,
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"), 8),
    "v_head_dim": 8,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    "image_size": 16,
    "patch_size": 8,
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0},
}

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], Tensors]


@dataclass
class Row:
    """One line of a table: what was merged, whether each method's result loads, and how exact the average is."""

    name: str
    parameters: int = 0
    failures: list[str] = field(default_factory=list)
    wrong_roles: list[str] = field(default_factory=list)
    roundings: float = 0.0
    mergekit: str = ""
    excluded: str = ""

    @property
    def verdict(self) -> str:
        return "; ".join(self.failures) if self.failures else "all"

    @property
    def roles(self) -> str:
        return "; ".join(self.wrong_roles) if self.wrong_roles else "right"

    @property
    def is_good(self) -> bool:
        return not self.failures and not self.wrong_roles and self.roundings <= 1


def tiny_config(config_class: Any) -> Any:
    """Return a configuration with small sizes.

    Raises:
        Exception: Whatever the class raises if small sizes do not fit together.
    """
    default = config_class()
    sizes = {name: size for name, size in _SIZES.items() if hasattr(default, name)}
    for name in getattr(config_class, "sub_configs", None) or {}:
        part = getattr(default, name, None)
        if part is not None and hasattr(part, "model_type"):
            with contextlib.suppress(Exception):  # this part then keeps its size, and the model may be too large
                sizes[name] = tiny_config(type(part))
    try:
        return config_class(**sizes)
    except Exception:
        return config_class(**{name: size for name, size in sizes.items() if name != "head_dim"})


def families(only: str = "") -> Iterator[tuple[str, Callable[[], Any] | None, str]]:
    """Yield each family's name, a function that makes a tiny model (None if it does not get small), and why not.

    Args:
        only: Families whose name does not contain this text are left out, and their code is not imported.
    """
    for kind, mapping in KINDS.items():
        for model_type, names in mapping._model_mapping.items():
            if model_type not in CONFIG_MAPPING or only not in f"{kind}: {model_type}":
                continue
            config_class = CONFIG_MAPPING[model_type]
            model_class = mapping._load_attr_from_module(model_type, names)
            cls = model_class[0] if isinstance(model_class, tuple) else model_class
            name = f"{kind}: {config_class.model_type}"
            try:
                config = tiny_config(config_class)
                with torch.device("meta"):
                    count = sum(p.numel() for p in cls(config).parameters())
            except Exception as error:
                yield name, None, f"{type(error).__name__}"
                continue
            if count > LARGEST:
                yield name, None, f"{count / 1e6:.0f} M parameters"
            else:
                yield name, lambda cls=cls, config=config: cls(copy.deepcopy(config)), ""  # type: ignore[misc]


def hub_layouts() -> Iterator[tuple[str, Callable[[], Any], Change]]:
    """Yield models as they lie on the hub: a name, a function that makes the model, and what its files have instead."""
    t = transformers

    def make(model: str, config: str, changes: Mapping[str, Any] | None = None) -> Callable[[], Any]:
        def build() -> Any:
            tiny = tiny_config(getattr(t, config))
            for key, value in (changes or {}).items():
                setattr(tiny, key, value)
            return getattr(t, model)(tiny)

        return build

    def renamed(old: str, new: str) -> Change:
        return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}

    def more(*found: tuple[str, Callable[[Tensors], torch.Tensor]]) -> Change:
        return lambda tensors: tensors | {name: value(tensors) for name, value in found}

    def both(first: Change, second: Change) -> Change:
        return lambda tensors: second(first(tensors))

    def copy_of(name: str) -> Callable[[Tensors], torch.Tensor]:
        return lambda tensors: tensors[name].clone()

    def layers(pattern: str, value: torch.Tensor) -> list[tuple[str, Callable[[Tensors], torch.Tensor]]]:
        return [(pattern.format(i), lambda _: value.clone()) for i in range(_LAYERS)]

    mask, fill, frequencies = torch.ones(1, 1, 64, 64).tril(), torch.tensor(float("-inf")), torch.rand(4)
    gpt2, bert = make("GPT2LMHeadModel", "GPT2Config"), make("BertForMaskedLM", "BertConfig")
    tied = {"tie_word_embeddings": True}
    yield "gpt2: no prefix, masks", gpt2, both(renamed("transformer.", ""), more(*layers("h.{}.attn.bias", mask)))
    yield "bloom: no prefix", make("BloomForCausalLM", "BloomConfig"), renamed("transformer.", "")
    yield (
        "llama: rotary frequencies",
        make("LlamaForCausalLM", "LlamaConfig"),
        more(*layers("model.layers.{}.self_attn.rotary_emb.inv_freq", frequencies)),
    )
    yield (
        "pythia: masks, fill values",
        make("GPTNeoXForCausalLM", "GPTNeoXConfig"),
        more(
            *layers("gpt_neox.layers.{}.attention.bias", mask),
            *layers("gpt_neox.layers.{}.attention.masked_bias", fill),
        ),
    )
    yield (
        "t5: copies of the embedding",
        make("T5ForConditionalGeneration", "T5Config"),
        more(*((f"{part}.embed_tokens.weight", copy_of("shared.weight")) for part in ("encoder", "decoder"))),
    )
    yield (
        "whisper: tied head",
        make("WhisperForConditionalGeneration", "WhisperConfig"),
        more(("proj_out.weight", copy_of("model.decoder.embed_tokens.weight"))),
    )
    embedding = "bert.embeddings.word_embeddings.weight"
    yield (
        "bert: position numbers, tied decoder",
        bert,
        more(
            ("bert.embeddings.position_ids", lambda _: torch.arange(64)[None]),
            ("cls.predictions.decoder.weight", copy_of(embedding)),
        ),
    )
    yield (
        "bert: gamma and beta",
        bert,
        both(renamed("LayerNorm.weight", "LayerNorm.gamma"), renamed("LayerNorm.bias", "LayerNorm.beta")),
    )
    yield (
        "clip: position numbers",
        make("CLIPModel", "CLIPConfig"),
        more(("text_model.embeddings.position_ids", lambda _: torch.arange(64)[None])),
    )
    for name in ("Gemma3", "Llava"):
        yield (
            f"{name.lower()}: vision_tower.vision_model",
            make(f"{name}ForConditionalGeneration", f"{name}Config"),
            renamed("vision_tower.", "vision_tower.vision_model."),
        )
    yield (
        "roberta: tied decoder",
        make("RobertaForMaskedLM", "RobertaConfig", tied),
        more(("lm_head.decoder.weight", copy_of("roberta.embeddings.word_embeddings.weight"))),
    )
    yield "vit: no prefix", make("ViTForImageClassification", "ViTConfig"), renamed("vit.", "")


def save_models(folder: Path, make: Callable[[], Any], change: Change | None) -> None:
    """Store a base, changed if `change` is given, and three experts that differ from it a little."""
    torch.manual_seed(0)
    model = make().bfloat16()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for number in range(4):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, p in model.named_parameters():
                noise = torch.randn(p.shape, generator=generator) * 0.01 if number and p.requires_grad else 0
                p.copy_(start[name].float() + noise)
        model.save_pretrained(folder / str(number))
    if change is not None:
        file = folder / "0" / "model.safetensors"
        changed = {name: tensor.clone().contiguous() for name, tensor in change(load_file(file)).items()}
        save_file(changed, file, metadata={"format": "pt"})


def recipe(folder: Path, method: str) -> dict[str, Any]:
    """The recipe that merges the three experts; the average has no base."""
    experts = [{"model": str(folder / str(n)), "parameters": {"weight": 1.0}} for n in (1, 2, 3)]
    if method == "linear":
        return {
            "merge_method": method,
            "models": [{"model": str(folder / "0"), "parameters": {"weight": 1.0}}, *experts],
        }
    return {"merge_method": method, "base_model": str(folder / "0"), "models": experts}


def load(folder: Path, model_class: Any) -> tuple[Tensors, list[str]]:
    """Load a model with transformers; return its tensors, and which kinds of keys do not fit."""
    model, info = model_class.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    kinds = [k for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[k]]
    return {name: t.detach() for name, t in model.state_dict().items()}, kinds


def roundings(folders: Iterable[Path], merged: Tensors, model_class: Any) -> float:
    """Return the largest error of the average of these models, in units of the largest error of one rounding to bf16.

    The error is that against float64. The unit includes the bound on the error of sums in fp32, which counts where
    large values cancel each other.
    """
    inputs = [load(folder, model_class)[0] for folder in folders]
    worst = 0.0
    for name, tensor in merged.items():
        if tensor.is_floating_point() and tensor.numel():
            values = torch.stack([i[name].double() for i in inputs])
            exact = values.mean(0)
            unit = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 9)
            unit += len(inputs) * 2.0**-24 * values.abs().amax(0)
            worst = max(worst, float(((tensor.double() - exact).abs() / unit).nan_to_num(0.0).max()))
    return worst


def by_mergekit(folder: Path, model_class: Any) -> str:
    """Return whether mergekit averages the models into one that loads."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    out = folder / "mergekit"
    try:
        run_merge(
            MergeConfiguration.model_validate(recipe(folder, "linear") | {"dtype": "float32"}),
            str(out),
            MergeOptions(quiet=True, write_model_card=False),
        )
        kinds = load(out, model_class)[1]
    except (Exception, SystemExit) as error:
        return type(error).__name__
    return ", ".join(kinds) or "loads"


def try_family(
    name: str,
    make: Callable[[], Any],
    change: Change | None,
    quantised: tuple[Quantise, dict[str, Any]] | None = None,
    *,
    mergekit: bool,
) -> Row:
    """Merge one family by every method and load the results. With `quantised` all models are stored in that format."""
    row = Row(name)
    folder = Path(tempfile.mkdtemp(prefix="families-"))
    try:
        save_models(folder, make, change)
        model_class = type(make())
        if kinds := load(folder / "1", model_class)[1]:
            row.excluded = f"transformers loads what it saved with {', '.join(kinds)}"
            return row
        row.wrong_roles = wrong_roles(folder / "1", make())
        row.parameters = sum(t.numel() for t in load_file(folder / "1" / "model.safetensors").values())
        full = [folder / str(n) for n in range(4)]
        if quantised is not None:
            full = [store_quantised(model, *quantised, n) for n, model in enumerate(full)]
        dtype = {} if quantised is None else {"out_dtype": "bfloat16"}
        for method in METHODS:
            out = folder / method
            try:
                merge_checkpoints(recipe(folder, method) | dtype, out, model_card=False)
                merged, kinds = load(out, model_class)
                if kinds:
                    row.failures.append(f"{method}: {', '.join(kinds)}")
                if method == METHODS[0]:
                    row.roundings = roundings(full, merged, model_class)
            except Exception as error:
                row.failures.append(f"{method}: {str(error).replace(str(folder), '')[:120]}")
        if mergekit:
            row.mergekit = by_mergekit(folder, model_class)
    except Exception as error:
        row.failures.append(f"not made: {type(error).__name__}: {str(error)[:100]}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return row


COLUMNS: Final = ("model", "parameters", "loads", "error", "roles", "mergekit")


def cells(row: Row) -> tuple[str, ...]:
    return (row.name, f"{row.parameters:,}", row.verdict, f"{row.roundings:.2f}", row.roles, row.mergekit or "-")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="only models whose name contains this text")
    parser.add_argument("--out", type=Path, help="write the tables to this file")
    parser.add_argument("--mergekit", action="store_true", help="average the models with mergekit too")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    rows: list[Row] = []
    hub: list[Row] = []
    formats: list[Row] = []
    missing: list[tuple[str, str]] = []

    def run(
        target: list[Row],
        name: str,
        make: Callable[[], Any],
        change: Change | None = None,
        quantised: tuple[Quantise, dict[str, Any]] | None = None,
    ) -> None:
        with contextlib.redirect_stderr(io.StringIO()):
            row = try_family(name, make, change, quantised, mergekit=arguments.mergekit)
        if row.excluded:
            missing.append((name, row.excluded))
        else:
            target.append(row)
        print(
            f"{name}: {row.excluded or row.verdict}, {row.roundings:.2f}, roles {row.roles} {row.mergekit}", flush=True
        )

    for name, make, why in families(arguments.only):
        if make is None:
            missing.append((name, why))
        else:
            run(rows, name, make)
    for name, make, change in hub_layouts():
        if arguments.only in name:
            run(hub, name, make, change)
    for name, make, quantise, stated in quantised_layouts():
        if arguments.only in name:
            run(formats, name, make, quantised=(quantise, stated))
    everything = [*rows, *hub, *formats]
    good = [row for row in everything if row.is_good]
    counts = f"{len(rows)} families, {len(hub)} layouts of the hub, {len(formats)} quantised formats"
    total = f"{len(everything)} ({counts})"
    print(f"{len(good)} of {total} load after each of {', '.join(METHODS)}, with one rounding and the right roles")
    if arguments.out is not None:
        arguments.out.write_text(
            "# Architectures\n\nThe families of transformers that are merged in a test, each as a tiny bf16 model. "
            f"`make families` writes this page; it was made with transformers {transformers.__version__}, and by the "
            f"methods {', '.join(METHODS)}.\n\n"
            "- **loads**: after which of these methods transformers loads the result without missing, unexpected or "
            "mismatched keys.\n"
            "- **error**: that of the average of four models, in units of the largest error of one rounding to bf16.\n"
            "- **roles** are right if no weight's role contradicts the class of the module that owns it.\n"
            "- **mergekit**: whether mergekit's average loads too.\n\n"
            f"{by_kind(COLUMNS, map(cells, rows))}\n\n"
            f"## Layouts of the hub\n\n{table(COLUMNS, map(cells, hub))}\n\n"
            "## Quantised formats\n\nAll four models are stored in the format, and merged with `out_dtype: bfloat16`."
            f"\n\n{table(COLUMNS, map(cells, formats))}\n\n{left_out('Not merged', missing)}\n",
            encoding="utf-8",
        )
    return 0 if len(good) == len(everything) else 1


if __name__ == "__main__":
    sys.exit(main())
