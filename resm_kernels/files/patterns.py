"""Matches names with regular expressions from files, in time that is linear in the name's length.

Python's `re` tries one alternative after another, and there are short expressions for which the number of attempts
doubles with every letter of the name. Here an expression becomes a finite automaton, which follows all alternatives at
once. A step costs at most the number of the automaton's states, which `MAX_STATES` bounds; so a match takes at most
len(name)·MAX_STATES steps. Sets of states that were reached are kept, so that most steps are a look-up.

An automaton cannot express what needs memory of the text (backreferences) or a second look at it (lookarounds,
possessive and atomic groups), nor are flags supported. Such expressions are refused, and all others mean what they mean
in `re`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple, TypeAlias

MAX_LENGTH: Final = 1000
MAX_STATES: Final = 2000
MAX_NESTING: Final = 20
MAX_AUTOMATA: Final = 1000

_UNLIMITED: Final = -1
_CONTROLS: Final = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}


class _Letter(NamedTuple):
    """One letter for which `test` is true. `text` is the letter if there is only one, and "" for any letter."""

    test: Callable[[str], bool]
    text: str | None = None


class _Place(NamedTuple):
    """A condition on a place between letters: one of `^`, `$`, `b`, `B`."""

    kind: str


class _Sequence(NamedTuple):
    parts: tuple[_Node, ...]


class _Choice(NamedTuple):
    parts: tuple[_Node, ...]


class _Repeat(NamedTuple):
    part: _Node
    least: int
    most: int


_Node: TypeAlias = "_Letter | _Place | _Sequence | _Choice | _Repeat"


class _Parser:
    """Turns an expression that `re` has accepted into a tree."""

    def __init__(self, text: str) -> None:
        self._text, self._at, self._depth = text, 0, 0

    def parse(self) -> _Node:
        return self._choice()

    def _rest(self, length: int = 1) -> str:
        return self._text[self._at : self._at + length]

    def _take(self, length: int = 1) -> str:
        taken = self._rest(length)
        self._at += length
        return taken

    def _choice(self) -> _Node:
        branches = [self._sequence()]
        while self._rest() == "|":
            self._take()
            branches.append(self._sequence())
        return branches[0] if len(branches) == 1 else _Choice(tuple(branches))

    def _sequence(self) -> _Node:
        parts: list[_Node] = []
        while self._rest() not in ("", "|", ")"):
            parts.append(self._repeated(self._atom()))
        return _Sequence(tuple(parts))

    def _repeated(self, part: _Node) -> _Node:
        counts = {"*": (0, _UNLIMITED), "+": (1, _UNLIMITED), "?": (0, 1)}
        if self._rest() in counts and self._rest():
            least, most = counts[self._take()]
        elif match := re.compile(r"\{(\d*)(,?)(\d*)\}").match(self._text, self._at):
            if not match[1] and not match[2]:
                return part  # {} is two letters
            self._at = match.end()
            least = int(match[1] or 0)
            most = least if not match[2] else int(match[3]) if match[3] else _UNLIMITED
        else:
            return part
        if self._rest() == "+":
            raise ValueError("possessive repetition is not supported")
        if self._rest() == "?":  # what a lazy repetition matches is the same, only the order of attempts differs
            self._take()
        return _Repeat(part, least, most)

    def _atom(self) -> _Node:
        letter = self._take()
        if letter == "(":
            return self._group()
        if letter == "[":
            return self._set()
        if letter == ".":
            return _Letter(lambda c: c != "\n", "")
        if letter in "^$":
            return _Place(letter)
        if letter != "\\":
            return _Letter(letter.__eq__, letter)
        if self._rest() in "AZbB":
            kind = self._take()
            return _Place({"A": "^", "Z": "$"}.get(kind, kind))
        return self._escape()

    def _group(self) -> _Node:
        if self._rest() == "?":
            if self._rest(2) == "?:":
                self._take(2)
            elif self._rest(3) == "?P<":
                self._at = self._text.index(">", self._at) + 1
            else:
                raise ValueError(f"({self._rest(2)} is not supported")
        self._depth += 1
        if self._depth > MAX_NESTING:
            raise ValueError(f"has groups in groups more than {MAX_NESTING} levels deep")
        inner = self._choice()
        self._depth -= 1
        self._take()
        return inner

    def _escape(self) -> _Letter:
        """Return the letter that follows a backslash."""
        letter = self._take()
        tests: dict[str, Callable[[str], bool]] = {"d": str.isdecimal, "s": str.isspace, "w": _is_word}
        if letter.lower() in tests:
            test = tests[letter.lower()]
            return _Letter(test if letter.islower() else lambda c: not test(c))
        if letter in "xuU" and letter:
            code = self._take({"x": 2, "u": 4, "U": 8}[letter])
            return _letter(chr(int(code, 16)))
        if letter == "0":
            octal = re.compile("[0-7]{0,2}").match(self._text, self._at)
            assert octal is not None
            self._at = octal.end()
            return _letter(chr(int("0" + octal[0], 8)))
        if letter.isdigit():
            raise ValueError("a backslash before a digit (a reference to a group, or an octal number) is not supported")
        if letter == "N":
            raise ValueError(r"\N is not supported")
        return _letter(_CONTROLS.get(letter, letter))

    def _set(self) -> _Letter:
        """Return the letter that stands for a set, such as [a-z_]."""
        negative = self._rest() == "^"
        if negative:
            self._take()
        tests: list[Callable[[str], bool]] = []
        first = True
        while first or self._rest() != "]":
            first = False
            low = self._set_letter()
            if low.text and self._rest() == "-" and self._rest(2) != "-]":
                self._take()
                tests.append(_between(low.text, str(self._set_letter().text)))
            else:
                tests.append(low.test)
        self._take()
        return _Letter(lambda c: any(test(c) for test in tests) != negative)

    def _set_letter(self) -> _Letter:
        letter = self._take()
        if letter != "\\":
            return _letter(letter)
        if self._rest() == "b":
            self._take()
            return _letter("\b")
        return self._escape()


def _letter(text: str) -> _Letter:
    return _Letter(text.__eq__, text)


def _between(low: str, high: str) -> Callable[[str], bool]:
    return lambda c: low <= c <= high


def _is_word(letter: str) -> bool:
    return letter.isalnum() or letter == "_"


def _states(node: _Node) -> int:
    """Return how many states the automaton of a tree has; it is counted before they are made."""
    if isinstance(node, (_Letter, _Place)):
        return 1
    if isinstance(node, _Repeat):
        copies = node.least + 1 if node.most == _UNLIMITED else node.most
        return copies * (_states(node.part) + 1) + 1
    return sum(map(_states, node.parts)) + len(node.parts) + 1


class _State(NamedTuple):
    """A state: the letter that leads on from it, or the place at which one may go on, or None; and where to."""

    step: _Letter | _Place | None
    targets: tuple[int, ...]


class _Automaton:
    """The automaton of an expression that must match a whole name, or the part of it after one of its dots."""

    def __init__(self, tree: _Node) -> None:
        self._made: list[_State] = []
        self._end = self._add(None)
        whole = self._build(tree, self._end)
        # (.*\.)? before the expression
        loop = self._add(None)
        dot = self._add(_letter("."), whole)
        any_letter = self._add(_Letter(lambda c: c != "\n", ""), loop)
        self._made[loop] = _State(None, (any_letter, dot))
        self._start = self._add(None, whole, loop)
        self._steps: dict[tuple[frozenset[int], str, tuple[bool, ...]], frozenset[int]] = {}

    def _add(self, step: _Letter | _Place | None, *targets: int) -> int:
        self._made.append(_State(step, targets))
        return len(self._made) - 1

    def _build(self, node: _Node, target: int) -> int:
        """Make the states of a tree, from which `target` follows, and return the first."""
        if isinstance(node, (_Letter, _Place)):
            return self._add(node, target)
        if isinstance(node, _Sequence):
            for part in reversed(node.parts):
                target = self._build(part, target)
            return target
        if isinstance(node, _Choice):
            return self._add(None, *(self._build(part, target) for part in node.parts))
        if node.most == _UNLIMITED:
            loop = self._add(None)
            self._made[loop] = _State(None, (self._build(node.part, loop), target))
            first = loop
        else:
            first = target
            for _ in range(node.most - node.least):
                first = self._add(None, self._build(node.part, first), target)
        for _ in range(node.least):
            first = self._build(node.part, first)
        return first

    def matches(self, name: str) -> bool:
        states = frozenset((self._start,))
        for i, letter in enumerate(name):
            place = self._place(name, i)
            key = (states, letter, place)
            if key not in self._steps:
                self._steps[key] = self._step(states, letter, place)
            states = self._steps[key]
        return self._end in self._reached(states, self._place(name, len(name)))

    @staticmethod
    def _place(name: str, i: int) -> tuple[bool, ...]:
        """Return what is true of the place before letter `i`: it is the begin, the end, between word and other."""
        before, after = i > 0 and _is_word(name[i - 1]), i < len(name) and _is_word(name[i])
        return i == 0, i == len(name), before != after

    def _step(self, states: frozenset[int], letter: str, place: tuple[bool, ...]) -> frozenset[int]:
        reached = (self._made[state] for state in self._reached(states, place))
        return frozenset(
            target for step, targets in reached if isinstance(step, _Letter) and step.test(letter) for target in targets
        )

    def _reached(self, states: Iterable[int], place: tuple[bool, ...]) -> set[int]:
        """Return the states that are reached without a letter."""
        begin, end, boundary = place
        holds = {"^": begin, "$": end, "b": boundary, "B": not boundary}
        reached, waiting = set(states), list(states)
        while waiting:
            step, targets = self._made[waiting.pop()]
            if step is None or (isinstance(step, _Place) and holds[step.kind]):
                new = [target for target in targets if target not in reached]
                reached.update(new)
                waiting += new
        return reached


class NamePatterns:
    """Regular expressions in their order, of which the first counts that matches a name.

    An expression matches a name if it matches the whole of it, or the part after one of its dots, which is PEFT's rule:
    `re.fullmatch(rf"(.*\\.)?({expression})", name)`. Names hold no line breaks.

    Many adapters have an expression for each of thousands of modules, which is the module's name. Expressions without
    alternatives are therefore looked up in a table, whose keys are names with a blank for each letter that may differ.

    Raises:
        ValueError: An expression is not valid, is not supported, is longer than 1000 letters or repeats parts so often
            that its automaton would have more than 2000 states; or more than 1000 need an automaton. The message names
            the expression.
    """

    def __init__(self, expressions: Iterable[str]) -> None:
        self._tables: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        self._automata: list[tuple[int, _Automaton]] = []
        for number, expression in enumerate(expressions):
            tree = _parsed(expression)
            letters = [part.text if isinstance(part, _Letter) else None for part in tree.parts]
            if None in letters:
                self._automata.append((number, _Automaton(tree)))
            else:
                blanks = tuple(i for i, letter in enumerate(letters) if not letter)
                table = self._tables.setdefault(len(letters), {}).setdefault(blanks, {})
                table.setdefault("".join(letter or " " for letter in letters if letter is not None), number)
        if len(self._automata) > MAX_AUTOMATA:
            raise ValueError(f"got {len(self._automata)} expressions with alternatives, need at most {MAX_AUTOMATA}")

    def first(self, name: str) -> int | None:
        """Return the number of the first expression that matches, or None."""
        best = min(self._looked_up(name), default=None)
        for number, automaton in self._automata:
            if best is not None and number > best:
                break
            if automaton.matches(name):
                return number
        return best

    def _looked_up(self, name: str) -> Iterable[int]:
        starts = [0, *(i + 1 for i, letter in enumerate(name) if letter == ".")]
        for start in starts:
            part = name[start:]
            for blanks, table in self._tables.get(len(part), {}).items():
                letters = list(part)
                for i in blanks:
                    letters[i] = " "
                number = table.get("".join(letters))
                if number is not None:
                    yield number


def _parsed(expression: str) -> _Sequence:
    shown = repr(expression[:80])
    if len(expression) > MAX_LENGTH:
        raise ValueError(f"pattern {shown}… has {len(expression)} letters, need at most {MAX_LENGTH}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sets that a later version of Python might read in another way
            re.compile(expression)
    except RecursionError:
        raise ValueError(f"pattern {shown} is nested too deeply") from None
    except (re.error, OverflowError) as error:
        raise ValueError(f"pattern {shown} is no regular expression: {error}") from error
    try:
        tree = _Parser(expression).parse()
    except ValueError as error:
        raise ValueError(f"pattern {shown}: {error}; need a plain regular expression") from None
    if (count := _states(tree)) > MAX_STATES:
        raise ValueError(f"pattern {shown} repeats parts too often: {count} states, need at most {MAX_STATES}")
    return tree if isinstance(tree, _Sequence) else _Sequence((tree,))
