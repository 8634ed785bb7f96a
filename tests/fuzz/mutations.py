"""Makes hostile texts and JSON from good ones: values exchanged, moved, repeated, and cut in the middle."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy


class Raw(str):
    """JSON text that is written as it is."""


HOSTILE_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        7,
        2**31,
        2**32,
        2**53,
        2**63 - 1,
        2**63,
        2**64 - 1,
        2**64,
        10**30,
        10**99,
        -(10**20),
    ),
    *(Raw("1" + "0" * 400), Raw("-" + "9" * 5000), Raw("1e400"), Raw("-1e999"), Raw("1e-400"), Raw("NaN")),
    *(Raw("Infinity"), Raw("-Infinity"), 0.5, 1e308, -0.0, 1e-300),
    *(
        "",
        "x",
        "a\0b",
        "\n",
        "~nosuchuser/x",
        "../x",
        "/etc/passwd",
        "x" * 300,
        "ä",
        "\u202e",
        "default",
        "fp32",
        "F8_E4M3",
    ),
    *(
        Raw('"\\ud800"'),
        Raw('"\\udc80x"'),
        Raw('"\\u0000"'),
        Raw("[" * 70 + "]" * 70),
        Raw("[" * 3000),
        Raw('{"a":' * 100),
    ),
    *(
        Raw('{"a":1,"a":2}'),
        Raw("["),
        Raw("tru"),
        Raw("'x'"),
        [],
        {},
        [[]],
        [{}],
        {"": {}},
        [1, 2],
        [0],
        ["x"],
        {"x": 1},
    ),
    *([None], [-1], [1.5], [True], [2**63], [0, 2**64 - 1], [2**32, 2**32], ["default"], {"template": "{{ x }}"}),
)


def written(data: Any) -> bytes:
    """Return data as JSON in which `Raw` texts stand as they are."""
    if isinstance(data, Raw):
        return data.encode()
    if isinstance(data, dict):
        pairs = (
            written(key if isinstance(key, Raw) else str(key)) + b":" + written(value) for key, value in data.items()
        )
        return b"{" + b",".join(pairs) + b"}"
    if isinstance(data, (list, tuple)):
        return b"[" + b",".join(map(written, data)) + b"]"
    return json.dumps(data).encode()


def _places(data: Any) -> list[tuple[Any, Any]]:
    """Every container within data, with a key of it."""
    keys = data.keys() if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    return [place for key in keys for place in ((data, key), *_places(data[key]))]


@st.composite
def mutated(draw: DrawFn, good: Any, values: SearchStrategy[Any] | None = None) -> Any:
    """Data with up to three places changed; `values` are further values for them."""
    data = copy.deepcopy(good)
    hostile = st.sampled_from(HOSTILE_VALUES) | st.integers() | st.floats() | st.text(max_size=5)
    hostile = hostile if values is None else values | hostile
    for _ in range(draw(st.integers(0, 3))):
        places = _places(data)
        if not places:
            break
        container, key = draw(st.sampled_from(places))
        match draw(st.integers(0, 5)):
            case 0 | 1 | 2:
                container[key] = copy.deepcopy(draw(hostile))
            case 3:
                del container[key]
            case 4:
                other, other_key = draw(st.sampled_from(places))
                container[key] = copy.deepcopy(
                    other.get(other_key) if isinstance(other, dict) else other[other_key:][:1]
                )
            case _ if isinstance(container, dict):
                new_key = draw(st.text(max_size=8) | st.sampled_from(["__metadata__", "<<", "x" * 2000]))
                container[new_key] = copy.deepcopy(draw(hostile))
            case _:
                container.insert(key, copy.deepcopy(draw(hostile)))
    return data


@st.composite
def damaged(draw: DrawFn, contents: SearchStrategy[bytes]) -> bytes:
    """Contents of which a piece is cut out, repeated, or replaced, in every fourth case."""
    content = draw(contents)
    if draw(st.integers(0, 3)):
        return content
    start = draw(st.integers(0, len(content)))
    end = min(len(content), start + draw(st.integers(0, 20)))
    new = draw(st.binary(max_size=8) | st.sampled_from([b"", b"\xff", b"\xef\xbb\xbf", b"\0", b"[" * 500, b'"', b"\\"]))
    times = draw(st.sampled_from([0, 1, 1, 2, 200]))
    return content[:start] + (new or content[start:end] * times) + content[end:]
