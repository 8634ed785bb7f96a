"""Says whether PEFT's wrapper of a layer computes what the model would with a changed layer.

PEFT puts a wrapper in a layer's place that has the layer's weight and bias, without the adapter, and few other
attributes. Code that calls the layer works. Code that computes with `self.layer.weight` ignores the adapter, and code
that reads `self.layer.stride` fails.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from typing import Any, Final

import torch
from torch import nn

_NOT_RUN: Final = ("__init__", "_init_weights", "reset_parameters")
"""Methods that set weights, but do not compute with them."""
_ISINSTANCE: Final = re.compile(r"isinstance\([^()]*\)")
_KEPT: Final = r"weight\.(?:dtype|device|shape|size)|bias|in_features|out_features|base_layer|training"
"""What a wrapper answers as the layer does."""


def attribute_read(owner: type[nn.Module], child: str) -> str | None:
    """Return an attribute of its layer `child` that a class reads and that a wrapper does not answer rightly.

    None if there is none, or if the class has no source code. Where parts of the weight are read of a layer that is
    also called, the code has another path beside the plain one, as for slices of tensor-parallel training.
    """
    source, layer = _source(owner.__mro__), rf"\bself\.{re.escape(child)}"
    names = re.findall(rf"{layer}\.(?!(?:{_KEPT})\b)(\w+)", source)
    is_called = re.search(rf"{layer}\(", source) is not None
    is_factor = re.search(rf"{layer}\.weight *@", source) is not None
    spared = "weight" if is_called and not is_factor else None
    return next((n for n in names if not hasattr(nn.Module, n) and n != spared), None)


def is_linear(layer: nn.Linear) -> bool:
    """Return True if a layer of a class of its own computes nothing but x·Wᵀ + b; it is tried on a small copy."""
    if type(layer).forward is nn.Linear.forward:
        return True
    small = copy.deepcopy(layer)
    generator = torch.Generator().manual_seed(0)
    small.in_features, small.out_features = 6, 4
    small.weight = nn.Parameter(torch.randn(4, 6, generator=generator), requires_grad=False)
    if small.bias is not None:
        small.bias = nn.Parameter(torch.randn(4, generator=generator), requires_grad=False)
    x = torch.randn(3, 5, 6, generator=generator)
    try:
        found = small(x)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # of a layer of another shape
        return False
    return isinstance(found, torch.Tensor) and torch.allclose(found, nn.functional.linear(x, small.weight, small.bias))


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
