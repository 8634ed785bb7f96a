"""Recipes in mergekit's format: this package reads and checks them, and resolves the parameters of each tensor."""

from __future__ import annotations

from resm_kernels.recipe.chat_templates import AUTO, CHAT_TEMPLATES
from resm_kernels.recipe.documents import document_name, kept_folders, unread_documents
from resm_kernels.recipe.errors import Location, RecipeError, dotted
from resm_kernels.recipe.folders import canonical_folder, model_and_adapter, model_folder, recorded_base_name
from resm_kernels.recipe.load import RecipeSource, load_recipe
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
    "RecipeSource",
    "Setting",
    "Slice",
    "Source",
    "TokenEntry",
    "TokenSource",
    "TokenizerEntry",
    "canonical_folder",
    "document_name",
    "dotted",
    "kept_folders",
    "load_recipe",
    "model_and_adapter",
    "model_folder",
    "parse_setting",
    "recorded_base_name",
    "unread_documents",
]
