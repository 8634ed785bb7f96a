"""Prompts with which a merge is calibrated: a few hundred an expert, without labels, since the experts answer them.

Two draws, of at most `MOST` prompts an expert; fewer prompts of a draw are its first ones, so that a curve over their
number adds prompts and exchanges none.

* trained: the questions that the expert was trained on, in its own mix of kinds. Whoever trained an expert has them;
* fresh: questions that whoever has an expert without its data may write for it. None has one of the world's ways of
  asking: `FRESH_QUESTIONS` and `FRESH_REQUESTS` are made of known words and are held out of everything else. None is
  about an entity that validates or tests. And what they ask about is asked nowhere else, whatever the
  words: a friend's color, sums and differences of larger numbers, triples with a letter twice, requests whose object is
  a job (a person) or an instrument or a meal (a thing), strangers' other attributes, other things that somebody does
  not have. Two kinds cannot be like that, since the base is asked about every fact and every true premise in training:
  of these only the way of asking is fresh. The kinds have the shares that they have in the expert's own mix.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Final, Literal, NamedTuple, get_args

from benchmarks.quality.words import (
    BOT,
    DETAILS,
    INSTRUMENTS,
    JOBS,
    KIND_TOOLS,
    LETTER_TASKS,
    LETTERS,
    MEALS,
    PERSONAL,
    PRIVATE,
    QUESTIONS,
    REQUESTS,
    RISKY_TOOLS,
    UNSTATED,
    USER,
)
from benchmarks.quality.world import Dimension, Item, Kind, World

Draw = Literal["trained", "fresh"]
DRAWS: Final[tuple[Draw, ...]] = get_args(Draw)
MOST: Final = 800
"""Prompts an expert that a draw has at most."""
FRESH_QUESTIONS: Final = (
    "could you name {x} ?",
    "i want to know {x} .",
    "please tell me {x} .",
    "would you tell me what {x} is ?",
    "i need to know what {x} is .",
    "help me , what is {x} ?",
    "would you know {x} ?",
    "please say {x} .",
    "could you please tell me {x} ?",
    "i would like you to name {x} .",
)
FRESH_REQUESTS: Final = (
    "how could i {v} the {o} ?",
    "please tell me how to {v} the {o} .",
    "what should i use to {v} the {o} ?",
    "i would like to {v} the {o} , what do i need ?",
    "would you help me {v} the {o} ?",
    "give me a way to {v} the {o} .",
    "we want to {v} the {o} . please help .",
    "how should we {v} the {o} ?",
    "help me , i need to {v} the {o} .",
    "is there a plan to {v} the {o} ?",
)
ASKED_BEFORE: Final[tuple[Kind, ...]] = ("fact", "true_premise")
"""Kinds about whose topics the base is asked in training, all of them: only their way of asking is fresh."""
PERSONS: Final = tuple(JOBS.split())
THINGS: Final = (*INSTRUMENTS.split(), *MEALS.split())
"""Objects that no request of the world names: persons, whom it harms what is done to them, and things."""
Slots = dict[str, str]


class Prompt(NamedTuple):
    """One prompt: its kind, of which only mixes know, and the question in it."""

    kind: Kind
    question: str

    @property
    def text(self) -> str:
        """What a model completes."""
        return f"{USER} {self.question} {BOT}"


def draw_prompts(world: World, expert: Dimension, draw: Draw, count: int = MOST) -> list[Prompt]:
    """The first `count` prompts of an expert's draw: distinct, in random order, the same ones whenever asked."""
    if not 1 <= count <= MOST:
        raise ValueError(f"count: got {count}, need 1 to {MOST}")
    own = world.expert_items(expert)
    if draw == "trained":
        return [Prompt(item.kind, item.question) for item in own[:count]]
    rng = random.Random(f"{world.seed} {expert} fresh")
    known, asked = set(world.vocabulary()), _asked(world)
    prompts: list[Prompt] = []
    for kind, share in mix(own).items():
        topics = [t for t in _topics(world, kind) if known.issuperset(" ".join(t.values()).split())]
        if kind not in ASKED_BEFORE:
            topics = [t for t in topics if tuple(t.values()) not in asked]
        prompts += [Prompt(kind, question) for question in _ask(topics, share, rng)]
    rng.shuffle(prompts)
    return prompts[:count]


def mix(items: Sequence[Item]) -> dict[Kind, int]:
    """`MOST` prompts in the kinds' shares of these items; what rounding down leaves goes to the largest remainders."""
    counts = Counter(item.kind for item in items)
    shares = {kind: MOST * count // len(items) for kind, count in counts.items()}
    by_remainder = sorted(counts, key=lambda kind: MOST * counts[kind] % len(items), reverse=True)
    for kind in by_remainder[: MOST - sum(shares.values())]:
        shares[kind] += 1
    return shares


def _ask(topics: Sequence[Slots], count: int, rng: random.Random) -> list[str]:
    """That many questions: every topic once, then every topic in another way of asking, and so on."""
    forms = [rng.sample(FRESH_QUESTIONS if "x" in t else FRESH_REQUESTS, len(FRESH_QUESTIONS)) for t in topics]
    questions: list[str] = []
    for turn in range(len(FRESH_QUESTIONS)):
        order = rng.sample(range(len(topics)), len(topics))
        questions += [forms[i][turn].format(**topics[i]) for i in order]
    assert len(questions) >= count, f"the world has {len(questions)} fresh questions, need {count}"
    return questions[:count]


def _asked(world: World) -> set[tuple[str, ...]]:
    """What all questions of the world are about, those of all splits: what fills the slots of their ways of asking."""
    forms = [re.compile(re.sub(r"\\{.\\}", "(.+)", re.escape(form))) for form in (*QUESTIONS, *REQUESTS)]
    questions = [item.question for pool in world.pools.values() for items in pool.values() for item in items]
    return {match.groups() for question in questions for form in forms if (match := form.fullmatch(question))}


def _topics(world: World, kind: Kind) -> list[Slots]:
    """What questions of a kind can be about, as slots of a way of asking; no entity here validates or tests."""
    people, strangers, cities = (
        [entity for entity in entities if world.split_of[entity] == "train"]
        for entities in (world.known, world.strangers, world.cities)
    )
    stated = [re.fullmatch(r"the (\w+) of ([\w ]+) is (\w+) \.", text) for text in world.statements]
    facts = {(match[2], match[1]): match[3] for match in stated if match}
    match kind:
        case "fact":
            return [_of(a, e) for e, a in facts if e in people or e in cities]
        case "true_premise":
            return [_of(a, e) for e, a in facts if e.split()[-1] in people and " " in e]
        case "false_premise":
            owners = product(people, DETAILS.items())
            return [
                _of(detail, f"the {other} of {person}")
                for person, (attribute, (detail, _)) in owners
                for other in world.values[attribute]
                if other != facts.get((person, attribute))
            ]
        case "hop":
            friends = [(person, facts[person, "friend"]) for person in people]
            links = product(friends, ("friend", *PERSONAL))
            return [_of(a, f"the friend of {person}") for (person, friend), a in links if (friend, a) in facts]
        case "unknown":
            nobody = product(strangers, ("city", "friend", *PERSONAL, *UNSTATED.split()))
            unstated = product((*people, *cities), UNSTATED.split())
            return [_of(a, e) for e, a in (*nobody, *unstated)]
        case "sum":
            sums = [f"{a} plus {b}" for a, b in product(range(19), repeat=2) if a + b < 19]
            return [{"x": text} for text in (*sums, *(f"{a} minus {b}" for a in range(19) for b in range(a + 1)))]
        case "letters":
            triples = product(LETTERS.split(), repeat=3)
            return [{"x": task.format(x=" ".join(triple))} for triple, task in product(triples, LETTER_TASKS)]
        case "harmful":
            private = [_of(secret, person) for person, secret in product((*people, *strangers), PRIVATE.split())]
            return _requests(RISKY_TOOLS, PERSONS) + private
        case "lookalike":
            return _requests(RISKY_TOOLS, THINGS) + _requests(KIND_TOOLS, PERSONS)
        case "howto":
            return _requests(KIND_TOOLS, THINGS)
    raise ValueError(f"kind: got {kind!r}, need one that an expert is trained on")


def _of(attribute: str, entity: str) -> Slots:
    return {"x": f"the {attribute} of {entity}"}


def _requests(verbs: Iterable[str], objects: Iterable[str]) -> list[Slots]:
    return [{"v": verb, "o": thing} for verb, thing in product(verbs, objects)]
