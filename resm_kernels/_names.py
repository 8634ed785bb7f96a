"""What tensor names say to methods and recipes alike: which tensors belong to the vocabulary."""

from __future__ import annotations

import re
from typing import Final

_VOCABULARY: Final = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|(?:word|tok)_embeddings|embed_in|shared|embed_out|output|output_layer|lm_head"
    r"|lm_head\.(?:linear|decoder)|cls\.predictions(?:\.decoder)?|vocab_projector|backbone\.embeddings)"
    r"\.(?:weight|bias)$"
)
_IN_LAYER: Final = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.\d+\.")


def is_vocabulary(name: str) -> bool:
    """True if the tensor has a row for each token of the vocabulary: input embedding, output head, its bias."""
    return _VOCABULARY.search(name) is not None and _IN_LAYER.search(name) is None
