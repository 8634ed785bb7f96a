"""Recipes in mergekit's format: this package reads and checks them, and resolves the parameters of each tensor."""

from __future__ import annotations

from resm_kernels.recipe.chat_templates import AUTO, CHAT_TEMPLATES
from resm_kernels.recipe.errors import Location, RecipeError, dotted
from resm_kernels.recipe.folders import canonical_folder, model_and_adapter, model_folder, recorded_base_name
from resm_kernels.recipe.load import load_recipe
from resm_kernels.recipe.parts import Part, Slice, Source
from resm_kernels.recipe.schema import Recipe
from resm_kernels.recipe.settings import Setting, parse_setting
from resm_kernels.recipe.tokens import BASE, UNION, TokenEntry, TokenizerEntry, TokenSource

__all__ = [
    "AUTO",
    "BASE",
    "CHAT_TEMPLATES",
    "UNION",
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
    "canonical_folder",
    "dotted",
    "load_recipe",
    "model_and_adapter",
    "model_folder",
    "parse_setting",
    "recorded_base_name",
]
