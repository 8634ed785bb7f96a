"""The prompts with which merges are calibrated: where they come from, how large and how mixed their draws are."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

import pytest

pytest.importorskip("transformers")

from benchmarks.quality.prompts import (
    ASKED_BEFORE,
    DRAWS,
    FRESH_QUESTIONS,
    FRESH_REQUESTS,
    MOST,
    Draw,
    Prompt,
    draw_prompts,
)
from benchmarks.quality.text import build_tokenizer
from benchmarks.quality.words import BOT, QUESTIONS, REQUESTS, USER
from benchmarks.quality.world import KINDS_OF, SPLITS, Dimension, World


@pytest.fixture(scope="module", params=[0, 17])
def world(request: pytest.FixtureRequest) -> World:
    return World(request.param)


@pytest.fixture(scope="module")
def again(world: World) -> World:
    """The same world, made anew."""
    return World(world.seed)


def all_prompts(world: World, draw: Draw) -> list[Prompt]:
    return [prompt for expert in KINDS_OF for prompt in draw_prompts(world, expert, draw)]


def pattern(form: str) -> str:
    """A way of asking as a regular expression whose groups are its slots."""
    return re.sub(r"\\{.\\}", "(.+)", re.escape(form))


def topic(question: str) -> tuple[str, ...]:
    """What fills the slots of the fresh way of asking that gives this question."""
    matches = [re.fullmatch(pattern(form), question) for form in (*FRESH_QUESTIONS, *FRESH_REQUESTS)]
    found = [match.groups() for match in matches if match]
    return min(found, key=lambda slots: len(" ".join(slots)))


def pools(world: World) -> list[str]:
    """Every question of every split that the world could ask."""
    return [item.question for split in SPLITS for items in world.pools[split].values() for item in items]


@pytest.mark.parametrize("draw", DRAWS)
def test_no_prompt_validates_or_tests(world: World, draw: Draw) -> None:
    held_out = {item.question for split in ("valid", "test") for item in world.questions(split)}
    entities = {entity for entity, split in world.split_of.items() if split != "train"}
    for prompt in all_prompts(world, draw):
        assert prompt.question not in held_out
        if prompt.kind not in ("sum", "letters"):
            assert not entities & set(prompt.question.split()), prompt


def test_trained_prompts_are_the_experts_questions_in_their_order(world: World) -> None:
    for expert in KINDS_OF:
        expected = [(item.kind, item.prompt) for item in world.expert_items(expert)[:MOST]]
        assert [(p.kind, p.text) for p in draw_prompts(world, expert, "trained")] == expected


def test_fresh_prompts_are_asked_as_nothing_else_is(world: World) -> None:
    documents = {text.split(f" {BOT} ")[0].removeprefix(f"{USER} ") for text in world.base_documents()}
    everything = documents | set(pools(world))
    for prompt in all_prompts(world, "fresh"):
        assert prompt.question not in everything
        assert not any(re.fullmatch(pattern(form), prompt.question) for form in (*QUESTIONS, *REQUESTS)), prompt


def test_fresh_prompts_are_about_what_nothing_else_asks(world: World) -> None:
    asked = " | ".join(pools(world)) + " |"
    with_word = defaultdict(set)
    for i, question in enumerate(pools(world)):
        for word in question.split():
            with_word[word].add(i)
    about = {(prompt.kind, topic(prompt.question)) for prompt in all_prompts(world, "fresh")}
    for kind, slots in about:
        if kind in ASKED_BEFORE:
            assert f" {slots[0]} " in asked
        elif len(slots) == 1:
            assert f" {slots[0]} " not in asked, slots
        else:
            assert not set.intersection(*(with_word[word] for word in slots)), slots


def test_fresh_prompts_have_known_words_alone(world: World) -> None:
    tokenizer = build_tokenizer(world)
    encoded = tokenizer([prompt.text for prompt in all_prompts(world, "fresh")])["input_ids"]
    assert not any(tokenizer.unk_token_id in ids for ids in encoded)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("expert", KINDS_OF)
def test_draws_are_whole_distinct_nested_and_repeatable(
    world: World, again: World, draw: Draw, expert: Dimension
) -> None:
    prompts = draw_prompts(world, expert, draw)
    assert len(prompts) == min(MOST, len(world.expert_items(expert))) == len({p.question for p in prompts})
    for count in (1, 64, 256):
        assert draw_prompts(again, expert, draw, count) == prompts[:count]
    with pytest.raises(ValueError, match=rf"count: got {MOST + 1}, need 1 to {MOST}"):
        draw_prompts(world, expert, draw, MOST + 1)


@pytest.mark.parametrize("expert", KINDS_OF)
def test_fresh_kinds_have_the_experts_shares(world: World, expert: Dimension) -> None:
    own = world.expert_items(expert)
    expected = {kind: count / len(own) for kind, count in Counter(item.kind for item in own).items()}
    prompts = draw_prompts(world, expert, "fresh")
    whole, part = (Counter(p.kind for p in prompts[:count]) for count in (MOST, 256))
    assert set(whole) == set(expected)
    for kind, share in expected.items():
        assert abs(whole[kind] - MOST * share) < 1
        # Of 256 drawn from 800 the standard deviation is at most 0.026.
        assert abs(part[kind] / 256 - share) < 0.1


def test_fresh_prompts_repeat_no_topic_before_all_were_there(world: World) -> None:
    for expert in KINDS_OF:
        times = Counter((prompt.kind, topic(prompt.question)) for prompt in draw_prompts(world, expert, "fresh"))
        for kind in {kind for kind, _ in times}:
            of_kind = [count for (other, _), count in times.items() if other == kind]
            assert max(of_kind) - min(of_kind) <= 1, kind
