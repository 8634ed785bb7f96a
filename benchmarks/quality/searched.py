"""Merges whose weights and λ are searched for with a budget of questions, as rows of a table beside grids."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.quality.candidates import SFT, Candidate, Row, Search, merge_of, tuned_rows
from benchmarks.quality.evaluate import answer, score
from benchmarks.quality.merging import OUT_DTYPE, SEED, StateDict, scratch_folder
from benchmarks.quality.world import KINDS_OF, HeldOutSplit, Item, World
from resm_kernels import methods
from resm_kernels.dtypes import dtype_name
from resm_kernels.live import LiveModels
from resm_kernels.search import search_recipes

BUDGETS: Final = (50, 150, 500)
"""Questions of each trial. Grids are chosen with all of the validation split's 550."""
TRIALS: Final = 60
BEST_BY: Final[tuple[Literal["mean", "worst"], ...]] = ("mean", "worst")
"""What the best trial is best in: the average of the dimensions, or the least of them."""
SEARCHED: Final = "resm"
GRIDS: Final = ("resm", "tsvm", "ties", "iso_c", "multislerp")
"""The methods whose grids stand beside."""
WEIGHT: Final = (0.3, 2.0)
"""The range of each expert's weight."""
LAMBDA: Final = (0.6, 1.6)
"""The range of λ at the first and at the last layer."""
LAMBDA_REST: Final = (0.6, 2.4)
"""The range of λ of embeddings and head, which are averaged."""
DIMENSIONS: Final = tuple(KINDS_OF)

Judge = Callable[..., dict[str, float]]


def mixed(items: list[Item]) -> list[Item]:
    """The questions with the kinds in turn, so that the first few hold questions of every kind."""
    by_kind: dict[str, list[Item]] = {}
    for item in items:
        by_kind.setdefault(item.kind, []).append(item)
    turns = itertools.zip_longest(*by_kind.values())
    return [item for turn in turns for item in turn if item is not None]


def judge_of(world: World) -> Judge:
    """A function that scores a model as helpful, honest and harmless, in percent, in a world."""

    def evaluate(
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        split: HeldOutSplit,
        questions: int | None = None,
    ) -> dict[str, float]:
        items = mixed(world.questions(split))[:questions]
        scores = score(items, answer(model, tokenizer, [item.prompt for item in items]))
        return {name: scores[name] for name in DIMENSIONS}

    return evaluate


def searched_rows() -> list[Row]:
    """RESM searched for with each budget and either choice of the best trial, RESM as it comes, and grids."""
    searched = [
        Row(
            "searched",
            f"RESM, {TRIALS} trials with {questions} questions, best by {best_by}",
            (Candidate(SFT, SEARCHED, search=Search(questions, TRIALS, best_by)),),
        )
        for best_by, questions in itertools.product(BEST_BY, BUDGETS)
    ]
    grids = {row.name: row.candidates for row in tuned_rows()}
    tuned = [Row("searched", f"{methods.get(name).title}, grid", grids[name]) for name in GRIDS]
    return [*searched, Row("searched", "RESM, defaults", (merge_of(SEARCHED),)), *tuned]


def space(models: Path, method: str) -> dict[str, Any]:
    """The recipe with ranges: a weight for each expert, λ over the layers and elsewhere."""
    rest, layers = {"range": list(LAMBDA_REST)}, [{"range": list(LAMBDA)}, {"range": list(LAMBDA)}]
    return {
        "merge_method": method,
        "base_model": str(models / "base"),
        "models": [{"model": str(models / name), "parameters": {"weight": {"range": list(WEIGHT)}}} for name in SFT],
        "parameters": {"lambda": [{"filter": "layers", "value": layers}, {"value": rest}]},
        "dtype": dtype_name(OUT_DTYPE),
    }


class Searcher:
    """Searches for the candidates of one seed; the test questions are left to who measures.

    Args:
        models: The seed's folder of models.
        world: The seed's world, which asks the questions.
        scratch: A folder that is made for a candidate's files, and removed when the candidate is done.
    """

    def __init__(self, models: Path, world: World, scratch: Path) -> None:
        self._models, self._world, self._scratch = models.resolve(), world, scratch

    def __call__(self, candidate: Candidate) -> StateDict:
        """The tensors of the best merge of a candidate that has a search."""
        search = candidate.search
        if search is None or candidate.method is None:
            raise ValueError(f"candidate: got {candidate.key}, need a merge with a search")
        with scratch_folder(self._scratch):
            file = self._scratch / "space.yaml"
            file.write_text(yaml.safe_dump(space(self._models, candidate.method), sort_keys=False))
            report = search_recipes(
                file,
                judge_of(self._world),
                self._scratch / "search",
                trials=search.trials,
                questions=search.questions,
                best_by=search.best_by,
                held_out=False,
                random_seed=SEED,
                threads=1,
            )
            with LiveModels(random_seed=SEED, threads=1) as live:
                return {name: tensor.clone() for name, tensor in live.tensors(report.out / "best.yaml")}
