"""Search spaces: what ranges mean, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoints import Family

from resm_kernels.recipe import RecipeError
from resm_kernels.search import SearchError, Space, load_space

pytestmark = pytest.mark.usefixtures("one_thread")


def space_of(family: Family, method: str = "resm", weights: Any = None, **parameters: Any) -> Space:
    recipe = family.recipe(method, parameters=parameters)
    for model in recipe["models"] if weights is not None else []:
        model["parameters"] = {"weight": weights}
    file = family.root / "space.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return load_space(file)


def test_ranges_stand_wherever_a_parameter_has_a_value(family: Family) -> None:
    space = space_of(
        family,
        weights={"range": [0.5, 2]},
        beta={"range": [0.01, 10], "log": True},
        rank_rule="fixed",
        rank={"range": [1, 9], "step": 4, "default": 5},
        outlier_clip={"choices": [False, True]},
        **{
            "lambda": [
                {"filter": "mlp", "value": [{"range": [0, 1]}, 0.5, {"range": [2, 3], "default": 2.5}]},
                {"filter": "attn", "value": {"range": [0, 0.4]}},
                {"value": 1.5},
            ]
        },
    )
    assert [r.name for r in space.ranges] == [
        *("models[0].weight", "models[1].weight", "models[2].weight"),
        *("beta", "rank", "outlier_clip", "lambda[mlp][0]", "lambda[mlp][2]", "lambda[attn]"),
    ]
    values = space.baselines()["defaults"]
    # The method's own defaults where they are in the range, else the nearest; the middle where there is none.
    assert values == {
        **{f"models[{i}].weight": 1.0 for i in range(3)},
        "beta": 0.01,
        "rank": 5,
        "outlier_clip": False,
        "lambda[mlp][0]": 1.0,
        "lambda[mlp][2]": 2.5,
        "lambda[attn]": 0.4,
    }
    recipe = space.recipe(values | {"models[1].weight": 0.7, "rank": 9})
    assert [m["parameters"]["weight"] for m in recipe["models"]] == [1.0, 0.7, 1.0]
    assert recipe["parameters"]["rank"] == 9 and isinstance(recipe["parameters"]["rank"], int)
    assert recipe["parameters"]["lambda"] == [
        {"filter": "mlp", "value": [1.0, 0.5, 2.5]},
        {"filter": "attn", "value": 0.4},
        {"value": 1.5},
    ]
    assert recipe["base_model"] == str(family.base_folder)


def test_baselines_are_the_defaults_and_equal_weights(family: Family) -> None:
    assert list(space_of(family, weights={"range": [0.5, 2]}).baselines()) == ["defaults"]
    space = space_of(family, weights={"range": [0.5, 2], "default": 0.5}, beta={"range": [0, 1], "default": 0.3})
    baselines = space.baselines()
    assert baselines["defaults"] == {**{f"models[{i}].weight": 0.5 for i in range(3)}, "beta": 0.3}
    assert baselines["uniform"] == {**{f"models[{i}].weight": 1.0 for i in range(3)}, "beta": 0.3}


def test_whole_numbers_stay_whole_and_steps_end_within_the_range(family: Family) -> None:
    space = space_of(family, rank_rule="fixed", rank={"range": [2, 9], "step": 3}, gamma={"range": [0, 1], "step": 0.4})
    rank, gamma = space.ranges
    assert (rank.low, rank.high, rank.default) == (2, 8, 5) and rank.whole
    assert gamma.high == pytest.approx(0.8) and gamma.default == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("low", "high", "step", "last"),
    [(0.0, 0.7, 0.1, 0.7), (0.09, 1.0, 0.07, 1.0), (0.1, 0.3, 0.2, 0.3), (0.0, 0.65, 0.2, 0.6), (0.8, 0.9, 0.1, 0.9)],
)
@pytest.mark.filterwarnings("error")
def test_steps_end_where_decimal_numbers_say(family: Family, low: float, high: float, step: float, last: float) -> None:
    """Sums of float64 would end above the range, or before its last number; Optuna counts in decimals too."""
    given = {"range": [low, high], "step": step, "default": last}
    (energy,) = space_of(family, energy=given).ranges
    assert (energy.high, energy.default) == (last, last)
    optuna = pytest.importorskip("optuna", reason="optuna is not installed (extra search)")
    assert optuna.distributions.FloatDistribution(low, energy.high, step=step).high == last


def test_whole_numbers_may_have_steps_written_with_a_point(family: Family) -> None:
    (rank,) = space_of(family, rank_rule="fixed", rank={"range": [1.0, 8.0], "step": 2.0, "default": 5.0}).ranges
    assert [repr(v) for v in (rank.low, rank.high, rank.step, rank.default)] == ["1", "7", "2", "5"]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "has no range; put one in place of a value"),
        ({"beta": {"range": [1, 0]}}, r"space.yaml:\d+: parameters.beta: range: got \[1, 0\], need \[low, high\]"),
        ({"beta": {"range": [0, "1"]}}, r"range: got \[0, '1'\], need \[low, high\], two numbers"),
        ({"beta": {"range": [0, 1, 2]}}, "two numbers with low < high"),
        ({"beta": {"range": [0, float("inf")]}}, "two numbers with low < high"),
        (
            {"beta": {"range": [0, 1], "lgo": True}},
            r"unknown key 'lgo', did you mean 'log'\?; known: range, log, step",
        ),
        ({"beta": {"range": [0, 1], "log": True}}, r"log: got True with the range \[0, 1\], need true or false"),
        ({"beta": {"range": [0, 1], "step": 0}}, "step: got 0, need a number above 0"),
        ({"beta": {"range": [0, 1], "step": 2}}, r"step: got 2, need no more than from low to high \(1\)"),
        ({"beta": {"range": [0, 1], "step": 1e-300}}, "step: got 1e-300, need at most 1e.09 steps from low to high"),
        (
            {"beta": {"range": [0, 1], "step": 0.25, "default": 0.3}},
            "default: got 0.3, need 0 and a multiple of the st",
        ),
        ({"k_min": {"range": [0, 9], "default": 5.5}}, "default: got 5.5, need a whole number"),
        ({"beta": {"choices": [1, True]}}, r"choices: got \[1, True\], need each value once"),
        ({"range": [0, 1]}, "parameters: got a range, need parameters with a range in place of a value"),
        ({"beta": {"range": [0, 1], "default": 2}}, "default: got 2, need a number from 0 to 1"),
        ({"k_min": {"range": [0, 1.5]}}, r"range: got \[0, 1.5\], need whole numbers for k_min"),
        ({"rank_rule": {"range": [0, 1]}}, r"rank_rule is no number; need choices: \[a, b\]"),
        ({"rank_rule": {"choices": []}}, r"choices: got \[\], need a list of values"),
        ({"rank_rule": {"choices": ["energy", "energy"]}}, "need each value once"),
        ({"rank_rule": {"choices": ["energy"], "default": "fixed"}}, "default: got 'fixed', need one of the choices"),
        ({"betta": {"range": [0, 1]}}, r"resm has no parameter 'betta', did you mean 'beta'\?"),
    ],
)
def test_wrong_ranges_are_errors_that_name_the_place(family: Family, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(SearchError, match=message):
        space_of(family, **parameters)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"energy": {"range": [0, 2]}},
            "with the highest value of each range: .*energy: got 2.0, need a number from 0",
        ),
        ({"gamma": {"range": [-1, 2]}}, "with the lowest value of each range: .*gamma: got -1.0, need a number of at"),
        ({"rank_rule": {"choices": ["energy", "enegy"]}}, "with the choice 'enegy' of rank_rule: .*'enegy'"),
        ({"energy": {"choices": [0.5, 7, 0.9]}}, "with the choice 7 of energy: .*energy: got 7, need a number from 0"),
    ],
)
def test_ranges_beyond_a_parameters_own_are_errors(family: Family, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        space_of(family, **parameters)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", "got list, need a mapping"),
        ("merge_method: rsem\n", r"merge_method: unknown merge method 'rsem', did you mean 'resm'\?"),
        ("a: 1\n---\nb: 2\n", "has 2 documents, need one recipe"),
    ],
)
def test_files_that_are_no_recipe_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(text)
    with pytest.raises(SearchError, match=message):
        load_space(file)
    with pytest.raises(SearchError, match=r"missing\.yaml"):
        load_space(tmp_path / "missing.yaml")
