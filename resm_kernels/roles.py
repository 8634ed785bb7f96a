"""The role of a tensor in its model: which kind of module owns it, and which matrices it holds.

`role_by_name` reads the role from the tensor's name and shape alone. `engine.roles` takes it from the model's class
where transformers has that, and uses these rules for the names of parameters only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from resm_kernels.tensor_names import HEAD_MODULES, is_vocabulary, last_part, layer_position, module_of


class Role(str, Enum):
    """What a tensor is to the module that owns it.

    The first three hold linear maps, which spectral methods decompose. `EMBEDDING`, `OUTPUT_HEAD`, `POSITION_TABLE`
    and `BIAS_TABLE` hold rows that are looked up, or that stand for a token each. `STATE` are parameters of a
    non-linear recurrence such as Mamba's `A_log`. `NORM` includes the gains of weight normalisation.
    """

    LINEAR = "linear"
    FUSED_EXPERTS = "fused_experts"
    CONVOLUTION = "convolution"
    EMBEDDING = "embedding"
    OUTPUT_HEAD = "output_head"
    POSITION_TABLE = "position_table"
    NORM = "norm"
    BIAS = "bias"
    BIAS_TABLE = "bias_table"
    STATE = "state"
    OTHER = "other"

    def __str__(self) -> str:
        return self.value

    @property
    def is_linear_map(self) -> bool:
        """True if the tensor is multiplied with, so that directions of its matrices mean something."""
        return self in (Role.LINEAR, Role.FUSED_EXPERTS, Role.CONVOLUTION)

    @property
    def is_vocabulary(self) -> bool:
        """True for embeddings and output heads."""
        return self in (Role.EMBEDDING, Role.OUTPUT_HEAD)

    @property
    def is_table(self) -> bool:
        """True for the other tensors whose rows are looked up."""
        return self in (Role.POSITION_TABLE, Role.BIAS_TABLE)


@dataclass(frozen=True)
class TensorRole:
    """The role of one tensor.

    Reshaped to (slices, rows, columns), the stored tensor is a stack of the matrices that it holds.

    Attributes:
        role: The role.
        module: The name of the module that owns the tensor, as transformers holds it in memory.
        slices: How many matrices it holds: the experts of fused experts, the groups of a grouped convolution, else 1.
        rows, columns: The shape of each as it is stored. A convolution has a row for each output channel, and a column
            for each input channel and place of its kernel.
        transposed: True if each matrix is stored as (in, out): GPT-2's Conv1D, the experts of gpt-oss and Llama 4,
            transposed convolutions.
    """

    role: Role
    module: str
    slices: int
    rows: int
    columns: int
    transposed: bool = False

    @property
    def matrices(self) -> tuple[int, int, int]:
        """The shape (slices, rows, columns)."""
        return self.slices, self.rows, self.columns


def stacked_role(role: Role, module: str, shape: Sequence[int], *, transposed: bool = False) -> TensorRole:
    """Return the role of a tensor (slices, rows, …), whose other dimensions are columns."""
    return TensorRole(role, module, shape[0], shape[1], math.prod(shape[2:]), transposed)


def matrix_role(
    role: Role, module: str, shape: Sequence[int], *, slices: int = 1, transposed: bool = False
) -> TensorRole:
    """Return the role of a tensor (slices · rows, …), whose other dimensions are columns."""
    rows = shape[0] if shape else 1
    return TensorRole(role, module, slices, rows // slices, math.prod(shape[1:]), transposed)


_STATE: Final = re.compile(r"A_logs?|Ds?|dt|dt_bias|time_(?:decay|first|faaaa|mix_\w+|maa_\w+)|recurrent_param|ssm_\w+")
_BIAS_TABLE: Final = re.compile(
    r"(?:\w*_)?rel(?:ative)?_(?:pos(?:ition)?_|attention_)?bias(?:_table|es)?(?:_\w+)?"
    r"|attention_biases|rpb|position_bias|rel_attn_embed"
)
_BIAS: Final = re.compile(r"(?:\w*_)?bias(?:es)?(?:_[a-z]|_[ih]h_l\d+\w*)?")
_POSITION: Final = re.compile(
    r"(?:.*_)?(?:pos|positions?|positional|position_ids)(?:_.*)?|wpe|rel_pos\w*|emb_rel_\w|distance_embedding"
    r"|rel_embeddings|time_embeddings|\w*(?:row|column|col)_embed(?:ders?|dings?)?"
)
_LOOKUP: Final = re.compile(
    r"(?!.*(?:patch|vision|image|audio|pixel|frame|video))(?:.*_)?emb(?:ed|eds|edding|eddings|d)?(?:_\d+|_concat)?|embed_(?!out$)\w+|wte|shared|codevectors|codebooks?"
)
_NORM: Final = re.compile(r".*norm.*|ln|ln_?\w{1,4}|rms\w*|bn\d*|gn\d*", re.IGNORECASE)
_EXPERTS: Final = re.compile(r"(?:^|\.)(?:\w*experts?|block_sparse_moe|ffn\.experts\.mlp)(?:\.|$)")
_INTO_HIDDEN: Final = re.compile(r"(?:^|_)(?:down|w2|output|fc2|wo|c_proj)(?:_|\d|$)")
_DEPTHWISE: Final = re.compile(r"depth_?wise|dw_?conv|^conv1d$|short_?conv|^[qkv]_conv1d$|sconv")
_HEADS: Final = (*HEAD_MODULES, "lm_heads", "generator_lm_head")
_ROOT_HEADS: Final = ("head", "output", "output_layer", "proj_out", "output_projection", "unembed")
_HEAD_ENDS: Final = (["predictions", "decoder"], ["lm_head", "decoder"], ["lm_head", "linear"])
_PLAIN: Final = re.compile(
    r"(?:[qkvo]|out|gate|up|down|gate_up|qkv|q_a|q_b|kv_a|kv_b|kv_a_proj_with_mqa)(?:_proj)|w[123]|fc\d|fc_(?:in|out)"
    r"|query|key|value|query_key_value|dense(?:_h_to_4h|_4h_to_h)?|gate|score|classifier|wi(?:_\d)?|wo|router"
)
_PLAIN_TABLES: Final = re.compile(
    r"embed_tokens(?:_\w+)?|embed_positions|embed_in|wte|wpe|shared|(?:word|token|tok|position|token_type)_embeddings?"
    r"|relative_attention_bias"
)
_TORCH_MATRICES: Final = re.compile(r"(?:in|[qkv])_proj_weight|weight_[ih]h_l\d+(?:_reverse)?")
"""Matrices of torch's own `MultiheadAttention` and recurrent networks, which are parameters of their modules."""
_IN_OUT_MATRICES: Final = ("text_projection",)
"""Parameters that are matrices stored as (in, out), as OpenAI's and OpenCLIP's models have them."""
_DBRX: Final = re.compile(r"\.experts\.mlp\.(?:w1|v1|w2)$")
_IN_OUT_TYPES: Final = ("gpt_oss", "llama4", "llama4_text", "aria", "aria_text", "openai_privacy_filter")
"""Model types whose fused experts are stored as (experts, in, out)."""
_CONV1D_TYPES: Final = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Model types whose linear modules are transformers' Conv1D, which stores (in, out)."""
_CONV1D: Final = re.compile(r"c_attn|c_proj|c_fc|q_attn")


def parameter_role(parameter: str) -> Role | None:
    """Return the role that the parameter's own name states, whatever module owns it; None if it states none."""
    if _STATE.fullmatch(parameter):
        return Role.STATE
    if _BIAS_TABLE.fullmatch(parameter):
        return Role.BIAS_TABLE
    if _BIAS.fullmatch(parameter):
        return Role.BIAS
    if parameter in ("weight_g", "original0"):
        return Role.NORM
    return lookup_role(parameter) if parameter != "weight" else None


def lookup_role(name: str) -> Role | None:
    """Return the role of a table of that name (a parameter's, or the last part of a module's); None for other names."""
    if _BIAS_TABLE.fullmatch(name):
        return Role.BIAS_TABLE
    if _POSITION.fullmatch(name):
        return Role.POSITION_TABLE
    return Role.EMBEDDING if _LOOKUP.fullmatch(name) else None


def is_norm(name: str) -> bool:
    """Return True if the last part of a module's name, or a class's name, is that of a normalisation."""
    return _NORM.fullmatch(name) is not None


def is_head(module: str) -> bool:
    """Return True if a module's name is that of an output head."""
    parts = [part for part in module.split(".") if not part.isdigit()]
    if layer_position(f"{module}.weight") is not None or not parts:
        return False
    return (
        parts[-1] in _HEADS or (len(parts) == 1 and parts[0] in _ROOT_HEADS) or module.endswith("predictions.decoder")
    )


def is_plain(name: str, shape: Sequence[int]) -> bool:
    """Return True if the name and shape leave no doubt about the role: `role_by_name` is right whatever the model is.

    Vectors and scalars hold no matrices in any model. The names that count are those of linear modules, embeddings,
    position tables and heads which all architectures use in one sense.
    """
    if len(shape) < 2:
        return True
    parameter, module = last_part(name), _module_part(module_of(name))
    if parameter_role(parameter) is not None:
        return True
    if parameter != "weight" or len(shape) != 2:
        return False
    return bool(_PLAIN.fullmatch(module) or _PLAIN_TABLES.fullmatch(module)) or is_head(module_of(name))


def role_by_name(name: str, shape: Sequence[int], config: Mapping[str, Any] | None = None) -> TensorRole:
    """Return the role of a tensor from its name and shape.

    Args:
        name: The tensor's name.
        shape: Its shape.
        config: The model's config.json, whose `model_type` and `hidden_size` say how some weights are stored.
    """
    config = config or {}
    parameter, module = last_part(name), module_of(name)
    part = _module_part(module)
    stated = parameter_role(parameter)
    if stated is not None:
        return matrix_role(stated, module, shape)
    table = lookup_role(part)
    is_vector = len(shape) < 2 or max(shape) == math.prod(shape)
    if is_vector and (table is None or len(shape) < 2):
        return matrix_role(Role.NORM if is_norm(part) else Role.OTHER, module, shape)
    if len(shape) >= 3 and _EXPERTS.search(name):
        return stacked_role(Role.FUSED_EXPERTS, module, shape, transposed=_is_in_out(part, parameter, shape, config))
    if _DBRX.search(name) and len(shape) == 2:
        counts = [n for section in _sections(config) if isinstance(n := section.get("moe_num_experts"), int)]
        slices = counts[0] if counts and shape[0] % counts[0] == 0 else 1
        return matrix_role(Role.FUSED_EXPERTS, module, shape, slices=slices, transposed=parameter == "w2")
    if len(shape) == 2 and (_TORCH_MATRICES.fullmatch(parameter) or parameter in _IN_OUT_MATRICES):
        return matrix_role(Role.LINEAR, module, shape, transposed=parameter in _IN_OUT_MATRICES)
    if parameter not in ("weight", "weight_v", "original1"):
        return matrix_role(Role.OTHER, module, shape)
    if len(shape) >= 3 and table in (None, Role.EMBEDDING):
        depthwise = shape[1] == 1 and _DEPTHWISE.search(part) is not None
        return matrix_role(Role.CONVOLUTION, module, shape, slices=shape[0] if depthwise else 1)
    if is_head(module):
        return matrix_role(Role.OUTPUT_HEAD, module, shape)
    if table is not None or is_vocabulary(name):
        return matrix_role(table or Role.EMBEDDING, module, shape)
    transposed = config.get("model_type") in _CONV1D_TYPES and _CONV1D.fullmatch(part) is not None
    return matrix_role(Role.LINEAR, module, shape, transposed=transposed)


def _module_part(module: str) -> str:
    """Return the last part of a module's name that is no number."""
    return next((part for part in reversed(module.split(".")) if not part.isdigit()), "")


def _is_in_out(part: str, parameter: str, shape: Sequence[int], config: Mapping[str, Any]) -> bool:
    """Return True if fused experts are stored as (experts, in, out).

    The width of the hidden states is the input of all experts' matrices but the last, whose output it is. Where that
    does not tell, because both dimensions are or neither is this width, the type of the model does.
    """
    hidden = {size for section in _sections(config) if isinstance(size := section.get("hidden_size"), int)}
    first, last = shape[-2] in hidden, shape[-1] in hidden
    if first == last:
        return any(section.get("model_type") in _IN_OUT_TYPES for section in _sections(config))
    into_hidden = _INTO_HIDDEN.search(part if parameter == "weight" else parameter) is not None
    return last if into_hidden else first


def _sections(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the configuration and its sections, such as `text_config`."""
    return [config, *(value for value in config.values() if isinstance(value, Mapping))]
