"""Searches for recipes: merges in memory are judged by a function, and Optuna proposes the next ones."""

from __future__ import annotations

from resm_kernels.search.errors import SearchError
from resm_kernels.search.run import SearchReport, search_recipes
from resm_kernels.search.space import Space, load_space
from resm_kernels.search.study import Trial

__all__ = ["SearchError", "SearchReport", "Space", "Trial", "load_space", "search_recipes"]
