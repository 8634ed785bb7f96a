"""What is known about spellings of tensors without transformers: a small table.

The table also says when there is a doubt that transformers has to settle: when a checkpoint has a buffer or a copy that
is listed here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from resm_kernels.checkpoint import TensorInfo


class Kind(NamedTuple):
    """What a tensor is that is left out or added, in words."""

    one: str
    many: str

    def counted(self, number: int) -> str:
        """Return the number of tensors in words, such as "24 causal masks"."""
        return f"{number} {self.one if number == 1 else self.many}"


IGNORED_WEIGHT: Final = Kind("weight that transformers does not load", "weights that transformers does not load")
COPY: Final = Kind("copy of a tied tensor", "copies of tied tensors")
UNINDEXED: Final = Kind("tensor that the index does not name", "tensors that the index does not name")
EMPTY_BIAS: Final = Kind(
    "bias of zeros that the model has no place for", "biases of zeros that the model has no place for"
)
MADE: Final = Kind("tensor that transformers makes itself", "tensors that transformers makes itself")


class _Buffer(NamedTuple):
    """A buffer that models compute themselves: its name, its numbers of dimensions, what it is called."""

    pattern: re.Pattern[str]
    dimensions: tuple[int, ...]
    kind: Kind


_BUFFERS: Final = tuple(
    _Buffer(re.compile(pattern), dimensions, Kind(*kind))
    for pattern, dimensions, kind in (
        (
            r"(^|\.)rotary(_emb|_pos_emb)?\.inv_freq$",
            (1,),
            ("vector of rotary frequencies", "vectors of rotary frequencies"),
        ),
        (r"(^|\.)(\w*attn|\w*attention)\.(bias|causal_mask)$", (3, 4), ("causal mask", "causal masks")),
        (r"\.masked_bias$", (0, 1), ("mask fill value", "mask fill values")),
        (r"(^|\.)position_ids$", (1, 2), ("vector of position numbers", "vectors of position numbers")),
        (r"(^|\.)(encoder|decoder)\.version$", (0, 1), ("version number", "version numbers")),
        (r"\.embed_positions\._float_tensor$", (0, 1), ("placeholder", "placeholders")),
    )
)

_COPIES: Final = (
    (r"(.*\.)?(?:encoder|decoder)\.embed_tokens\.weight", r"{0}shared.weight"),
    (r"lm_head\.weight", r"shared.weight"),
    (r"lm_head\.weight", r"model.shared.weight"),
    (r"lm_head\.weight", r"model.decoder.embed_tokens.weight"),
    (r"lm_head\.weight", r"model.language_model.embed_tokens.weight"),
    (r"lm_head\.weight", r"transformer.word_embeddings.weight"),
    (r"lm_head\.weight", r"word_embeddings.weight"),
    (r"embed_out\.weight", r"gpt_neox.embed_in.weight"),
    (r"language_model\.lm_head\.weight", r"language_model.model.embed_tokens.weight"),
    (r"proj_out\.weight", r"model.decoder.embed_tokens.weight"),
    (r"cls\.predictions\.decoder\.weight", r"*embeddings.word_embeddings.weight"),
    (r"cls\.predictions\.decoder\.bias", r"cls.predictions.bias"),
    (r"lm_head\.decoder\.weight", r"*embeddings.word_embeddings.weight"),
    (r"lm_head\.decoder\.bias", r"lm_head.bias"),
    (r"predictions\.decoder\.weight", r"*embeddings.word_embeddings.weight"),
    (r"predictions\.decoder\.bias", r"predictions.bias"),
    (r"vocab_projector\.weight", r"*embeddings.word_embeddings.weight"),
    (r"generator_lm_head\.weight", r"*embeddings.word_embeddings.weight"),
)
"""Copies of tied tensors: a pattern of the copy's whole name, and the name of the original. `{0}` in it is what the
pattern's group matched, `*` is anything."""

_RENAMED: Final = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"LayerNorm\.gamma$", "LayerNorm.weight"),
        (r"LayerNorm\.beta$", "LayerNorm.bias"),
        (r"\.weight_g$", ".parametrizations.weight.original0"),
        (r"\.weight_v$", ".parametrizations.weight.original1"),
        # Models with images, as they were before and as they are since transformers 4.52.
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^(vision_tower|vision_model|multi_modal_projector|image_newline)(?=\.|$)", r"model.\1"),
        (r"(vision_tower)\.vision_model\.", r"\1."),
    )
)
_QWEN_VL: Final = (
    (re.compile(r"^visual\."), "model.visual."),
    (re.compile(r"^model\.(?!visual\.|language_model\.)"), "model.language_model."),
)
_DIFFUSION_MODEL: Final = "model.diffusion_model."
"""What ComfyUI's files of diffusion models have before the names that their authors' files have."""
_BUFFER_ENDS: Final = ("inv_freq", ".bias", "causal_mask", "masked_bias", "position_ids", "version", "_float_tensor")
_COPY_ENDS: Final = (
    *("embed_tokens.weight", "lm_head.weight", "embed_out.weight", "proj_out.weight", "decoder.weight"),
    *("decoder.bias", "vocab_projector.weight"),
)


def buffer_kind(info: TensorInfo) -> Kind | None:
    """Return what kind of buffer a tensor is that models compute themselves; None if it is none."""
    if not info.name.endswith(_BUFFER_ENDS):
        return None
    return next((b.kind for b in _BUFFERS if b.pattern.search(info.name) and len(info.shape) in b.dimensions), None)


def copies(names: Iterable[str]) -> dict[str, str]:
    """Return the tensors that may be copies of tied ones: the copy's name → the original's."""
    known = dict.fromkeys(names)
    found: dict[str, str] = {}
    candidates = [name for name in known if name.endswith(_COPY_ENDS)]
    for pattern, original in _COPIES:
        for name in candidates:
            match = re.fullmatch(pattern, name)
            if match is None or name in found:
                continue
            wanted = original.format(match[1] or "") if match.re.groups else original
            source = next((n for n in known if n != name and _is(n, wanted)), None)
            if source is not None:
                found[name] = source
    return found


def _is(name: str, wanted: str) -> bool:
    return name.endswith(wanted[1:]) if wanted.startswith("*") else name == wanted


def renamed(names: Iterable[str]) -> dict[str, str]:
    """Return for each name the one that the table gives it; models of one architecture then have the same names."""
    result = {name: name for name in names}
    vision = any(re.match(r"(model\.)?visual\.", name) for name in result)
    for pattern, new in (*_RENAMED, *(_QWEN_VL if vision else ())):
        result = {name: pattern.sub(new, current, count=1) for name, current in result.items()}
    return result


def common_prefix(models: Iterable[Mapping[str, tuple[int, ...]]]) -> str:
    """Return the prefix without which all models have the same names and shapes; empty if there is none.

    Args:
        models: For each model the shapes of its tensors by name.
    """
    shapes = list(models)
    first = (f"{name.split('.')[0]}." for names in shapes for name in names)
    whole = (_DIFFUSION_MODEL for names in shapes for name in names if name.startswith(_DIFFUSION_MODEL))
    for prefix in dict.fromkeys(["", *first, *whole]):
        stripped = [{n.removeprefix(prefix): s for n, s in names.items()} for names in shapes]
        if all(len(new) == len(old) and new == stripped[0] for new, old in zip(stripped, shapes, strict=True)):
            return prefix
    return ""
