"""Recipes in mergekit's format: read, checked, and resolved to each tensor's parameters."""

from __future__ import annotations

from resm_kernels.recipe.chat_templates import AUTO, CHAT_TEMPLATES
from resm_kernels.recipe.errors import Location, RecipeError, dotted
from resm_kernels.recipe.load import load_recipe
from resm_kernels.recipe.parts import Part, Slice, Source
from resm_kernels.recipe.places import model_and_adapter, model_folder, same_place
from resm_kernels.recipe.schema import Recipe
from resm_kernels.recipe.settings import Setting, parse_setting
from resm_kernels.recipe.tokens import BASE, UNION, TokenEntry, TokenizerEntry, TokenSource
from resm_kernels.tensor_names import (
    LayerPlace,
    is_before_layers,
    is_vocabulary,
    layer_depth,
    layer_place,
    module_names,
    tensor_depths,
)

__all__ = [
    "AUTO",
    "BASE",
    "CHAT_TEMPLATES",
    "UNION",
    "LayerPlace",
    "Location",
    "Part",
    "Recipe",
    "RecipeError",
    "Setting",
    "Slice",
    "Source",
    "TokenEntry",
    "TokenSource",
    "TokenizerEntry",
    "dotted",
    "is_before_layers",
    "is_vocabulary",
    "layer_depth",
    "layer_place",
    "load_recipe",
    "model_and_adapter",
    "model_folder",
    "module_names",
    "parse_setting",
    "same_place",
    "tensor_depths",
]
