"""The 3H benchmark's searched merges: rows, budgets of questions, and that no test question is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quality_seed import write_seed

from benchmarks.quality import measure, searched
from benchmarks.quality.candidates import SFT, Candidate, Search, merge_of
from benchmarks.quality.merging import Models, merge
from benchmarks.quality.searched import BUDGETS, Searcher, judge_of, mixed, searched_rows, space
from benchmarks.quality.world import KINDS_OF, World

pytest.importorskip("optuna", reason="optuna is not installed (extra search)")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world() -> World:
    return World(0)


def test_the_first_questions_hold_every_kind(world: World) -> None:
    items = world.questions("valid")
    order = mixed(items)
    assert len(order) == len(items) and set(order) == set(items)
    kinds = {kind for members in KINDS_OF.values() for kind in members}
    for count in BUDGETS:
        assert {item.kind for item in order[:count]} == kinds


def test_rows_are_budgets_beside_grids() -> None:
    rows = searched_rows()
    assert rows == measure.rows_of("searched") and len({row.name for row in rows}) == len(rows)
    budgets = [c.search.questions for row in rows for c in row.candidates if c.search is not None]
    assert tuple(budgets) == BUDGETS + BUDGETS
    assert len({c.key for row in rows for c in row.candidates}) >= len(BUDGETS) + 8


def test_a_search_is_part_of_what_a_candidate_is() -> None:
    searches = (None, Search(50, 3), Search(50, 4), Search(60, 3), Search(50, 3, "worst"))
    keys = [Candidate(SFT, "resm", search=s).key for s in searches]
    assert len(set(keys)) == 5 and keys[0] == merge_of("resm").key


def test_a_candidate_is_the_best_merge_that_was_found_without_test_questions(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_seed(tmp_path / "seed", 0)
    asked: list[tuple[str, int]] = []

    def counted(world: World) -> searched.Judge:
        def evaluate(model: torch.nn.Module, *, split: str, questions: int) -> dict[str, float]:
            asked.append((split, questions))
            norm = float(model.get_parameter("model.norm.weight").double().norm())
            return dict.fromkeys(KINDS_OF, -norm)

        return evaluate

    monkeypatch.setattr(searched, "judge_of", counted)
    candidate = Candidate(SFT, "resm", search=Search(22, 5))
    (tmp_path / "scratch").mkdir()  # what a killed process left
    found = Searcher(tmp_path / "seed", world, tmp_path / "scratch")(candidate)
    assert asked == [("valid", 22)] * 5 and not (tmp_path / "scratch").exists()
    default = merge(Models(tmp_path / "seed"), merge_of("resm"))
    assert found.keys() == default.keys() and all(t.dtype == torch.bfloat16 for t in found.values())
    norms = [float(model["model.norm.weight"].double().norm()) for model in (found, default)]
    assert norms[0] <= norms[1]
    with pytest.raises(ValueError, match="need a merge with a search"):
        Searcher(tmp_path / "seed", world, tmp_path / "scratch")(merge_of("resm"))


def test_the_judge_scores_the_three_dimensions(world: World, tmp_path: Path) -> None:
    write_seed(tmp_path / "seed", 0)
    from benchmarks.quality.evaluate import load

    scores = judge_of(world)(*load(tmp_path / "seed" / "base"), split="valid", questions=22)
    assert list(scores) == list(KINDS_OF) and all(0 <= score <= 100 for score in scores.values())
    assert space(tmp_path, "resm")["models"][1]["model"] == str(tmp_path / "honest")
