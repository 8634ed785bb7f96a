"""Recipes of adapters that are merged to one adapter, without becoming whole models."""

from __future__ import annotations

from typing import Any, Final

from resm_kernels.methods import Method
from resm_kernels.recipe.errors import LocatedError
from resm_kernels.recipe.schema import Recipe

_WHOLE_MODELS: Final = (
    *("slices", "modules", "tokenizer_source", "tokenizer", "chat_template", "config_source", "state_dict_key"),
)
"""Keys of a recipe that have no meaning where adapters are merged to one."""


class AdapterRecipe(Recipe):
    """A checked recipe whose models are adapters of one base model.

    Its task vectors come from the adapters, so that `base_model` may be left out, and may be named for any method.
    """

    @classmethod
    def _recorded_base(cls, data: Any) -> str | None:
        return None

    def _check_bases(self, method: Method) -> None:
        for key in _WHOLE_MODELS:
            if getattr(self, key) is not None:
                raise LocatedError((key,), "has no meaning for adapters that are merged to one; need models alone")
        if self.output_format is not None:
            raise LocatedError(("out_dtype",), f"got {self.out_dtype}, need a dtype for an adapter's factors")
        if method.statistics is not None:
            raise LocatedError(
                ("merge_method",),
                f"{method.name} needs statistics of the layers' inputs, which whole models are merged with: use merge, "
                "and extract-lora for the result",
            )
