"""Patterns of names mean what they mean in PEFT, and take time that is linear in the name's length."""

from __future__ import annotations

import re
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resm_kernels.files import patterns
from resm_kernels.files.patterns import MAX_STATES, NamePatterns

NAMES = ("q_proj", "model.layers.0.self_attn.q_proj", "model.layers.10.mlp.up_proj", "a.b", "ab", "a..b", "é.٣ x-[{}]")


def as_in_peft(expression: str, name: str) -> bool:
    """The rule of peft's get_pattern_key."""
    return re.match(rf"(.*\.)?({expression})$", name) is not None


@pytest.mark.parametrize(
    "expression",
    [
        *("q_proj", "self_attn.q_proj", r"self_attn\.q_proj", "model", ".*", "", ".", "..", "[qk]_proj", "(q|k)_proj"),
        *(
            r"layers\.\d+\.mlp\.(up|down)_proj",
            r"^model.*q_proj",
            "^q_proj",
            "q_proj$",
            r"\Aab\Z",
            "a|b",
            "(a|b)*",
            "x*",
        ),
        *(
            r"\w+",
            r"\W",
            r"\D*",
            r"\S+",
            r"[^.]*",
            r"[\d.]+b?",
            "a{2}",
            "a{1,}b",
            "a{,2}b",
            "a{0}b",
            "a{x}",
            "{",
            "a{,}b",
        ),
        *("(?:a|ab)(?:c|b)?", "(?P<n>a)b", "a+?b*?", "(a?)*b", "(a*)*b", r"\bb", r"a\Bb", r"a\b\.b", "[]a]b", "[^]]b"),
        *(
            "[a-]b",
            "[a-c-]b",
            r"[\]\-a]b",
            r"\x61b",
            r"\u0061b",
            r"\0?ab",
            r"\.?b",
            "()ab",
            "(|a)b",
            "a()b",
            r"[\w.]+",
            "é.*",
        ),
        *(
            r"\d x-\[\{\}]",
            r"[\x61-\x63]b",
            r".*\..*",
            "a.b",
            "a..b",
            r"[[]",
            "[a&&b]b",
            "(^a|^b).*",
            "(a$|b$)",
            r"\_?ab",
        ),
    ],
)
def test_expressions_mean_what_they_mean_in_peft(expression: str) -> None:
    for name in NAMES:
        assert (NamePatterns([expression]).first(name) == 0) is as_in_peft(expression, name), name


atoms = st.sampled_from(
    ["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", r"\d", r"\b", r"\B", "^", "$", "(a|b)", "(?:ab|a|)", "(a*)", "x"]
)
repeats = st.sampled_from(["", "", "", "*", "+", "?", "{2}", "{0,2}", "{1,}", "*?", "??"])


@given(
    st.lists(st.tuples(atoms, repeats) | st.just(("|", "")), max_size=6).map(lambda p: "".join(a + r for a, r in p)),
    st.lists(st.text("ab.x1", min_size=1, max_size=8), min_size=1, max_size=6),
)
def test_random_expressions_mean_what_they_mean_in_peft(expression: str, names: list[str]) -> None:
    try:
        pattern = NamePatterns([expression])
    except ValueError:
        with pytest.raises(re.error):
            re.compile(expression)
        return
    for name in names:
        assert (pattern.first(name) == 0) is as_in_peft(expression, name), name


@given(
    st.lists(st.sampled_from(["a.b", r"a\.b", "b", "a", "[ab]", "x|b", "..b", "q.b", "a..", "axb"]), max_size=6),
    st.sampled_from(["a.b", "axb", "b", "a", "x.a.b", "q.a.b", "q.b", "aab"]),
)
def test_the_first_expression_that_matches_counts(expressions: list[str], name: str) -> None:
    expected = next((i for i, expression in enumerate(expressions) if as_in_peft(expression, name)), None)
    assert NamePatterns(expressions).first(name) == expected


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("(", "is no regular expression"),
        ("*a", "is no regular expression"),
        (r"(a)\1", "a reference to a group"),
        ("(?=a)", "is not supported"),
        ("(?<!a)b", "is not supported"),
        ("(?i)a", "is not supported"),
        ("(?(1)a|b)", "regular expression"),
        (r"\N{BULLET}", "is not supported"),
        ("a" * 1001, "has 1001 letters"),
        ("a{3000}", "repeats parts too often"),
        ("(a{100}){100}", "repeats parts too often"),
        ("((((a{60000}){60000}){60000}){60000})", "repeats parts too often"),
        ("(" * 300 + ")" * 300, "deep"),
        ("(" * 30 + ")" * 30, "deep"),
        ("a{99999999999999999999}", "is no regular expression"),
    ],
)
def test_what_an_automaton_cannot_match_is_refused(expression: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        NamePatterns([expression])


@pytest.mark.parametrize(
    "expression", ["(a+)+$", "((a*)*)*b", "(a|a)*b", "(.*.*.*.*.*.*)*x", "(a?){30}a{30}", "(a|b|ab)*c"]
)
def test_a_step_costs_at_most_all_states_and_a_letter_takes_one_step(expression: str) -> None:
    """`re` needs about 2^n attempts for some of these and a name of n letters."""
    steps = 0
    reached = patterns._Automaton._reached

    def counted(self: object, states: object, place: object) -> set[int]:
        nonlocal steps
        result = reached(self, states, place)
        steps += len(result)
        return result

    name = "a" * 300 + "!"
    with mock.patch.object(patterns._Automaton, "_reached", counted):
        NamePatterns([expression]).first(name)
    assert 0 < steps <= (len(name) + 1) * MAX_STATES


def test_thousands_of_names_are_looked_up_and_not_compared_one_by_one() -> None:
    names = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(40) for j in range(100)]
    table = NamePatterns(names)  # with dots that may be any letter
    assert [table.first(f"base.{name}") for name in names[::97]] == list(range(len(names)))[::97]
    assert table.first("model.layers.0.mlp.experts.7xup_proj") == 7
    assert not table._automata
