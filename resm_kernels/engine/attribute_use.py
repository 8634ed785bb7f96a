"""Says whether a model's code reads attributes of a layer that PEFT's wrapper of the layer does not have, or not truly.

PEFT puts a wrapper in a layer's place that has the layer's weight and bias, without the adapter, and few other
attributes. Code that calls the layer works. Code that computes with `self.layer.weight` ignores the adapter, and code
that reads `self.layer.stride` fails.
"""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any, Final

from torch import nn

_NOT_RUN: Final = ("__init__", "_init_weights", "reset_parameters")
"""Methods that set weights, but do not compute with them."""
_ISINSTANCE: Final = re.compile(r"isinstance\([^()]*\)")
_KEPT: Final = r"weight\.(?:dtype|device|shape|size)|bias|in_features|out_features|base_layer|training"
"""What a wrapper answers as the layer does."""


def attribute_read(owner: type[nn.Module], child: str) -> str | None:
    """Return an attribute of its layer `child` that a class reads and that a wrapper does not answer rightly.

    None if there is none, or if the class has no source code. A layer whose weight is read, but that is also called, is
    taken for one that is called: such code has a path for kernels of its own beside the plain one.
    """
    source, layer = _source(owner.__mro__), rf"\bself\.{re.escape(child)}"
    names = re.findall(rf"{layer}\.(?!(?:{_KEPT})\b)(\w+)", source)
    is_called = re.search(rf"{layer}\(", source) is not None
    return next((n for n in names if not hasattr(nn.Module, n) and not (n == "weight" and is_called)), None)


@functools.cache
def _source(classes: tuple[type, ...]) -> str:
    """Return the code of a class's methods that run when the model computes, given the class and its bases."""
    methods: dict[str, Any] = {}
    for base in reversed(classes):
        if base.__module__.startswith("transformers.models"):
            methods |= {name: method for name, method in vars(base).items() if inspect.isfunction(method)}
    texts = []
    for name, method in methods.items():
        if name not in _NOT_RUN:
            try:
                texts.append(inspect.getsource(inspect.unwrap(method)))
            except OSError:  # a package without sources
                continue
    return _ISINSTANCE.sub("", "\n".join(texts))
