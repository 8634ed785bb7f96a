"""The tokenizer of the output as a recipe states it: which vocabulary, and where embeddings of tokens come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator

from resm_kernels.suggestions import did_you_mean

UNION: Final = "union"
BASE: Final = "base"


@dataclass(frozen=True)
class TokenSource:
    """Where the embedding of one token comes from.

    Attributes:
        model: The model whose embedding it is, as the recipe names it; None: zeros.
        token: The token in that model's vocabulary; None: `token_id`, or the token itself if that is None too.
        token_id: The row of that model's embedding.
    """

    model: str | None
    token: str | None = None
    token_id: int | None = None


def _parse_source(data: Any) -> TokenSource:
    if isinstance(data, str):
        return TokenSource(data)
    if not isinstance(data, Mapping):
        raise ValueError(f"got {data!r}, need a model, or a mapping with kind: model_token or kind: zero")
    kind = data.get("kind")
    known = {"zero": ("kind",), "model_token": ("kind", "model", "token", "token_id")}
    if kind not in known:
        raise ValueError(f"kind: got {kind!r}, need one of model_token, zero{did_you_mean(kind, tuple(known))}")
    for key in data:
        if key not in known[kind]:
            raise ValueError(f"unknown key {key!r}{did_you_mean(key, known[kind])}; need {', '.join(known[kind])}")
    if kind == "zero":
        return TokenSource(None)
    model, token, token_id = data.get("model"), data.get("token"), data.get("token_id")
    if not isinstance(model, str):
        raise ValueError(f"model: got {model!r}, need one of the recipe's models")
    if (token is None) == (token_id is None):
        raise ValueError("need exactly one of token and token_id")
    if token is not None and not isinstance(token, str):
        raise ValueError(f"token: got {token!r}, need a token's text in quotes")
    if token_id is not None and (isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0):
        raise ValueError(f"token_id: got {token_id!r}, need a whole number of at least 0")
    return TokenSource(model, token, token_id)


def _parse_optional_source(data: Any) -> TokenSource | None:
    return None if data is None else _parse_source(data)


class TokenEntry(BaseModel):
    """What a recipe says about one token; `force` replaces the embeddings of models that have the token too."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Annotated[TokenSource | None, PlainValidator(_parse_optional_source)] = None
    force: bool = False


class TokenizerEntry(BaseModel):
    """The key `tokenizer`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = UNION
    tokens: Annotated[
        dict[str, Annotated[TokenEntry, BeforeValidator(lambda data: {} if data is None else data)]],
        BeforeValidator(lambda data: {} if data is None else data),
    ] = {}
    pad_to_multiple_of: Annotated[int, Field(ge=1, strict=True)] | None = None
