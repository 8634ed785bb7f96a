"""Reads YAML documents within limits; unlike PyYAML it refuses equal keys and data that grow through aliases."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import yaml

from resm_kernels.files.structure import MAX_DIGITS, Location, scalar_problem, shortened

MAX_BYTES: Final = 1 << 18
"""The largest text, in bytes; PyYAML reads so much in a few seconds. A recipe has some kilobytes."""
MAX_DEPTH: Final = 32
MAX_VALUES: Final = 100_000
"""The most values of all documents, where an alias counts as all that it stands for."""
MAX_DOCUMENTS: Final = 100

_MERGE_TAG: Final = "tag:yaml.org,2002:merge"
_BASE_60: Final = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")


@dataclass(frozen=True)
class Document:
    """A parsed document.

    Attributes:
        data: Its value; None for an empty document.
        root: Its syntax tree, which knows the lines; None for data that no text was parsed for.
        text: Its text.
    """

    data: Any
    root: yaml.Node | None = None
    text: str = ""

    @property
    def first_line(self) -> int | None:
        """The line, counted from 1, that it begins in."""
        return None if self.root is None else line_of(self.root)

    def line(self, location: Location) -> int | None:
        """Return the line, counted from 1, of the deepest part of `location` that the document has."""
        line, node = None, self.root
        for part in location:
            if isinstance(node, yaml.MappingNode):
                pairs = [(key, value) for key, value in node.value if key.value == str(part)]
                if not pairs:
                    break
                line, node = line_of(pairs[0][0]), pairs[0][1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                line = line_of(node)
            else:
                break
        return line


def parse_yaml(text: str, name: str, raising: type[ValueError]) -> tuple[Document, ...]:
    """Return the documents that YAML 1.1 states, as PyYAML's safe loader reads them; an empty text has none.

    Args:
        text: The file's content.
        name: The file's name, for errors.
        raising: The kind of the error.

    Raises:
        raising: The text is not YAML or longer than 256 KiB, or has more than 100 documents; a mapping has a key twice;
            it is nested more than 32 levels deep, has more than 100,000 values when all aliases are written out, an
            alias within the part that it stands for, a whole number of more than 100 digits, a number beyond float64's
            range, or a text that UTF-8 cannot express. The message names file and line.
    """
    if len(text.encode(errors="replace")) > MAX_BYTES:
        raise raising(f"{name}: has more than {MAX_BYTES} bytes, need at most so many")
    try:
        return tuple(_Loader(text).documents())
    except _Refused as error:
        raise raising(f"{name}:{error.line}: {error}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise raising(f"{name}:{line}: not valid YAML: has the character #x{error.character:04x}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line_or_file = f"{name}:{mark.line + 1}" if mark else name
        raise raising(f"{line_or_file}: not valid YAML: {getattr(error, 'problem', None) or error}") from error


def line_of(part: Any) -> int:
    """Return the line, counted from 1, of a node or an event."""
    line: int = part.start_mark.line
    return line + 1


class _Refused(Exception):
    """Valid YAML that is beyond a limit or ambiguous."""

    def __init__(self, node: yaml.Node | yaml.Event, problem: str) -> None:
        super().__init__(problem)
        self.line = line_of(node)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with limits, which hold while the text is parsed, before data are made of it."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._text = text
        self._depth = self._values = 0
        self._sizes: dict[int, int] = {}

    def documents(self) -> Iterator[Document]:
        """Yield each document."""
        self.get_event()  # type: ignore[no-untyped-call]
        roots: list[yaml.Node] = []  # kept, so that no other node gets the identity of one in `_sizes`
        while not self.check_event(yaml.StreamEndEvent):
            if len(roots) == MAX_DOCUMENTS:
                raise _Refused(self.peek_event(), f"has more than {MAX_DOCUMENTS} documents, need at most so many")  # type: ignore[no-untyped-call]
            root = self.compose_document()
            assert root is not None
            roots.append(root)
            self._values += self._sizes[id(root)]
            if self._values > MAX_VALUES:
                raise _Refused(root, f"has more than {MAX_VALUES} values with its aliases written out")
            text = self._text[root.start_mark.index : root.end_mark.index]
            yield Document(self.construct_document(root), root, text.strip() + "\n")

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            target = self.anchors.get(event.anchor)
            if target is not None and id(target) not in self._sizes:
                raise _Refused(event, f"the alias *{event.anchor} stands in the part that it stands for")
        self._depth += 1
        if self._depth > MAX_DEPTH + 1:
            raise _Refused(event, f"is nested more than {MAX_DEPTH} levels deep, need at most so many")
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None and id(node) not in self._sizes:
            self._sizes[id(node)] = self._size(node)
        return node

    def _size(self, node: yaml.Node) -> int:
        """Return how many values the node has with all aliases written out; its parts have been counted before."""
        size = 1
        if isinstance(node, yaml.MappingNode):
            self._check_keys(node)
            size += sum(self._sizes[id(part)] for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            size += sum(self._sizes[id(part)] for part in node.value)
        if size > MAX_VALUES:
            raise _Refused(node, f"has more than {MAX_VALUES} values with its aliases written out")
        return size

    def _check_keys(self, node: yaml.MappingNode) -> None:
        # YAML readers silently keep only the last of two equal keys, so that the author's first value would be ignored.
        line_of_key: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _Refused(key, "a list or mapping is a key, need a text")
            if key.value in line_of_key:
                raise _Refused(key, f"key {shortened(key.value)} is already set in line {line_of_key[key.value]}")
            line_of_key[key.value] = line_of(key)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return the value of a node; a text that its tag does not allow is an error that names the line."""
        if isinstance(node, yaml.ScalarNode) and node.tag != _MERGE_TAG:
            return self._scalar(node)
        return super().construct_object(node, deep)

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        kind = node.tag.rpartition(":")[2]
        # Base 60 (1:30 is 90) takes time in the square of the length, and Python reads long numbers slowly.
        if kind in ("int", "float") and (len(node.value) > 4 * MAX_DIGITS or _is_long_base_60(node.value)):
            raise _Refused(node, f"got a number of more than {MAX_DIGITS} digits, need a shorter one")
        try:
            value = super().construct_object(node)
        except (ArithmeticError, AttributeError, LookupError, ValueError) as error:
            raise _Refused(node, f"got {shortened(node.value)}, which is no {kind}") from error
        if isinstance(value, float) and math.isinf(value) and "inf" not in node.value.lower():
            raise _Refused(node, f"got {shortened(node.value)}, need a number that float64 can hold")
        problem = scalar_problem(value)
        if problem is not None:
            raise _Refused(node, problem)
        if not isinstance(value, Hashable):
            raise _Refused(node, f"got {shortened(node.value)} as {kind}, need a text or a number")
        return value


def _is_long_base_60(text: str) -> bool:
    return text.count(":") > MAX_DIGITS // 2 and _BASE_60.fullmatch(text) is not None
