"""Compares configurations of models whose tensors have the same shapes: heads, positions or layers may differ."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from resm_kernels.engine.architecture import names_key, parsed_entries

if TYPE_CHECKING:
    from resm_kernels.engine.models import Model

_NEUTRAL: Final = re.compile(
    # what the model is called, and how it is stored, loaded and run
    r"_name_or_path|name_or_path|architectures|auto_map|model_type|\w*transformers_version\w*|(torch_)?dtype|tokenizer_class"
    r"|quantization_config|compression_config|(_|_?\w+_)?attn_implementation\w*|use_(flash_attn|bfloat16|mamba_kernels|fp32\w*)"
    r"|fp16|bf16|fp32|torchscript|gradient_checkpointing|use_cache|cache_implementation|pretraining_tp|tp_size|ep_size"
    r"|chunk_size_feed_forward|output_(attentions|hidden_states|router_logits|scores)|return_dict\w*|unsloth\w*|base_model_tp_plan"
    r"|\w*_parallel_plan|pruned_heads|mamba_ssm_(cache_)?dtype|disable_custom_kernels|use_mambapy|use_mrope|num_logits_to_keep"
    # what the tensors' names say
    r"|\w*_?bias"
    # vocabulary and lengths
    r"|\w*vocab_size\w*|n_words|\w*_token_ids?|\w*_token_index|max_(position_embeddings|sequence_length|seq_len\w*|length)"
    r"|n_positions|n_ctx|seq_length|seq_len|model_max_length|min_length|max_new_tokens"
    # training
    r"|\w*dropout\w*|\w*_?pdrop|\w*layerdrop|drop_path\w*|initializer_\w+|init_\w+|initialize\w*|\w*_coef(ficient)?|\w*_loss\w*"
    r"|loss\w*|mask_(time|feature)_\w+|label_smoothing|rescale_prenorm_residual|router_jitter_noise|input_jitter_noise"
    r"|apply_spec_augment|train_\w+"
    # heads of classifiers, and how texts are generated
    r"|id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params|summary_\w+|classifier_\w+"
    r"|temperature|top_k|top_p|typical_p|do_sample|early_stopping|num_beams?\w*|num_return_sequences|(length|repetition)_penalty"
    r"|no_repeat_ngram_size|encoder_no_repeat_ngram_size|diversity_penalty|bad_words_ids|(begin_)?suppress_tokens|prefix"
    r"|remove_invalid_values|exponential_decay_length_penalty|forced_\w+|is_decoder|add_cross_attention"
    r"|cross_attention_hidden_size|tie_encoder_decoder|tf_legacy_loss|use_return_dict"
)
"""Entries that do not change what the weights mean."""

_DEFAULTS: Final = {"rope_theta": 10000, "rope_type": "default"}
_ROPE: Final = ("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq", "partial_rotary_factor")
_WINDOWS: Final = ("sliding_window", "max_window_layers")
USUAL_THETA: Final = ("gemma", "gemma2", "llama", "mistral", "qwen2")
"""Types of models whose positions have the base 10000 if they state none."""
FULL_ATTENTION: Final = ("qwen2", "qwen2_moe", "qwen3")
"""Types of models whose layers all attend to all positions if they say that they use no windows."""
_MOST: Final = 60
"""The most letters of a value that a warning shows."""


def config_warnings(models: Sequence[Model]) -> tuple[str, ...]:
    """Return a line for each model whose configuration gives weights of the same shapes another meaning.

    The output takes the configuration of the first model. Where two configurations differ in what they state,
    transformers is asked how it reads them, with its defaults and the names that it has now. If it is not installed or
    has no class for one of them, entries that only one configuration has are not compared, because the other model's
    default is not known; except for the positions', which is 10000 without scaling in nearly all models.
    """
    reference = models[0]
    warnings = []
    for model in {names_key(m.config): m for m in reversed(models[1:])}.values():
        found = _compared(reference, model)
        listed = "; ".join(f"{key} is {_shown(got)}, there {_shown(need)}" for key, need, got in found)
        if listed:
            warnings.append(
                f"{model.base_folder}: config.json gives weights another meaning than {reference.folder}'s: {listed}"
            )
    return tuple(reversed(warnings))


def _compared(reference: Model, model: Model) -> list[tuple[str, Any, Any]]:
    first, other = reference.config, model.config
    found = list(differences(first, other))
    if not found and not _is_in_doubt(first, other):
        return []
    parsed = [parsed_entries(m.base_folder) for m in (reference, model)]
    if None in parsed:
        return found
    assert parsed[0] is not None and parsed[1] is not None
    return list(differences(parsed[0], parsed[1], complete=True))


def _is_in_doubt(first: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return True if one configuration states what the other leaves to a default that is not known here."""
    both = (first, other)
    settled: set[str] = set()
    if all(_has_theta(config) for config in both):
        partial = [config for config in both if "partial_rotary_factor" in _positions(config)]
        settled.update(_ROPE if len(partial) != 1 else set(_ROPE) - {"partial_rotary_factor", "rope_parameters"})
    if not any(_uses_windows(config) for config in both):
        settled.update(_WINDOWS)
    for key in first.keys() | other.keys():
        a, b = first.get(key), other.get(key)
        if key in settled or _NEUTRAL.fullmatch(key) or (a is None and b is None):
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            if _is_in_doubt(a, b):
                return True
        elif a is None or b is None:
            stated, lacking = (b, first) if a is None else (a, other)
            if stated != _implied(lacking, key):
                return True
    return False


def _implied(config: Mapping[str, Any], key: str) -> Any:
    """Return what follows for an entry from others of the same configuration; None if nothing does."""
    heads, size, layers = (config.get(name) for name in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    if key == "layer_types":
        known = config.get("model_type") in FULL_ATTENTION and not _uses_windows(config)
        return ["full_attention"] * layers if known and isinstance(layers, int) else None
    if not isinstance(heads, int) or not isinstance(size, int) or not heads:
        return None
    return {"num_key_value_heads": heads, "head_dim": size / heads}.get(key)


def _has_theta(config: Mapping[str, Any]) -> bool:
    """Return True if the base of a configuration's rotary positions is stated, or is the usual one by default."""
    return "rope_theta" in _positions(config) or config.get("model_type") in USUAL_THETA


def differences(
    first: Mapping[str, Any], other: Mapping[str, Any], at: str = "", *, complete: bool = False
) -> Iterator[tuple[str, Any, Any]]:
    """Yield the entries that differ: the key, the value in `first`, the value in `other`.

    Args:
        complete: The configurations state every entry, so that None is a value; else it stands for a default.
    """
    unused = {key for key in _WINDOWS if not any(_uses_windows(config) for config in (first, other))}
    for key, need in first.items():
        got = other.get(key)
        if key in _ROPE or key in unused or key not in other or _NEUTRAL.fullmatch(key):
            continue
        if isinstance(need, Mapping) and isinstance(got, Mapping):
            yield from differences(need, got, f"{at}{key}.", complete=complete)
        elif isinstance(need, (list, tuple)) and isinstance(got, (list, tuple)) and len(need) == len(got):
            i = next((i for i, pair in enumerate(zip(need, got, strict=True)) if pair[0] != pair[1]), None)
            if i is not None:
                yield f"{at}{key}[{i}]", need[i], got[i]
        elif need != got and (complete or None not in (need, got) or key == "sliding_window"):
            yield f"{at}{key}", need, got
    positions = _positions(first), _positions(other)
    if all(positions):
        for key in dict.fromkeys([*positions[0], *positions[1]]):
            need, got = (p.get(key, _DEFAULTS.get(key)) for p in positions)
            if need != got and (complete or None not in (need, got)):
                yield f"{at}rope_parameters.{key}", need, got


def _uses_windows(config: Mapping[str, Any]) -> bool:
    """Return False if a configuration says that it uses no windows, whatever it says of them."""
    return config.get("use_sliding_window") is not False


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _MOST else f"{text[:_MOST]}…"


def _positions(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration's rotary positions in one form: transformers 4 and 5 write them in different ways."""
    found = {key: config[key] for key in _ROPE if not isinstance(config.get(key), (Mapping, type(None)))}
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(config.get(key), Mapping):
            found |= config[key]
    # Models with windows in some layers have positions for each kind of layers.
    for kind, prefix in (("full_attention", ""), ("sliding_attention", "rope_local_")):
        if isinstance(nested := found.pop(kind, None), Mapping):
            found |= {
                "rope_local_base_freq" if prefix and k == "rope_theta" else prefix + k: v for k, v in nested.items()
            }
    if "type" in found:
        found.setdefault("rope_type", found.pop("type"))
    found.pop("type", None)
    return found or ({"rope_type": "default"} if "num_attention_heads" in config else {})
