"""Compares configurations of models whose tensors have the same shapes: heads, positions or layers may differ."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from resm_kernels.engine.models import Model

_MEANING: Final = re.compile(
    # heads
    r"(num|n)_(attention_|key_value_|kv_|linear_(key|value)_)?heads?|(encoder|decoder)_attention_heads|head_dim"
    r"|(global|swa|linear_key|linear_value|qk_rope|qk_nope|v|mamba)_head_dim|multi_query|parallel_attn|new_decoder_architecture"
    # positions
    r"|(rope|rotary|mrope)_\w+|partial_rotary_factor|position_embedding_type|alibi|use_alibi|no_rope_layer_interval"
    # kinds of layers
    r"|layer_types|mlp_layer_types|layers_block_type|no_rope_layers|attention_(layers|types)|full_attn_idxs"
    r"|attn_layer_indices|mlp_only_layers|moe_layers|sliding_window\w*|use_sliding_window|max_window_layers"
    r"|attention_chunk_size|hybrid_override_pattern|decoder_sparse_step|first_k_dense_replace|moe_layer_freq"
    # functions between the weights
    r"|hidden_act\w*|activation_function|mlp_hidden_act|(rms_norm|layer_norm|norm)_(eps|epsilon)"
    r"|(attention|embedding|residual)_multiplier|logits_scaling|query_pre_attn_scalar|\w+_softcapping|scale_attn\w*"
    r"|num_experts_per_tok|norm_topk_prob|routed_scaling_factor|scoring_func|n_group|topk_group"
)
"""Entries that change what weights of the same shapes mean."""
_DEFAULTS: Final = {"rope_theta": 10000, "rope_type": "default"}
_LOCAL: Final = {"rope_local_rope_theta": "rope_local_base_freq"}
_ROPE: Final = ("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq", "partial_rotary_factor")


def config_warnings(models: Sequence[Model]) -> tuple[str, ...]:
    """Return a line for each model whose configuration gives weights of the same shapes another meaning.

    The output takes the configuration of the first model. Entries that only one of two configurations has are not
    compared, because the other model's default is not known here; except for the positions', which is 10000 without
    scaling in nearly all models.
    """
    reference = models[0]
    warnings = []
    for config, folder in {id(m.config): (m.config, m.base_folder) for m in models[1:]}.values():
        listed = "; ".join(f"{key} is {got}, there {need}" for key, need, got in differences(reference.config, config))
        if listed:
            warnings.append(f"{folder}: config.json gives weights another meaning than {reference.folder}'s: {listed}")
    return tuple(warnings)


def differences(first: Mapping[str, Any], other: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the entries that differ: the key, the value in `first`, the value in `other`."""
    for key, need in first.items():
        got = other.get(key)
        if key in _ROPE:
            continue
        if isinstance(need, Mapping) and isinstance(got, Mapping):
            yield from differences(need, got, f"{at}{key}.")
            continue
        compared = key in other and _MEANING.fullmatch(key)
        # None stands for a default, but for no window.
        if compared and need != got and (None not in (need, got) or key == "sliding_window"):
            yield f"{at}{key}", need, got
    positions = _positions(first), _positions(other)
    if all(positions):
        for key in dict.fromkeys([*positions[0], *positions[1]]):
            need, got = (p.get(key, _DEFAULTS.get(key)) for p in positions)
            if need != got and None not in (need, got):
                yield f"{at}rope_parameters.{key}", need, got


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
    return found or ({"rope_type": "default"} if "num_attention_heads" in config else {})
