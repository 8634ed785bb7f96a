"""The tokenizer of the output as a recipe describes it: its vocabulary, and the sources of the tokens' embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator

from resm_kernels.files import shortened
from resm_kernels.suggestions import did_you_mean

UNION: Final = "union"
"""The tokenizer source that takes the tokens of all models together."""

BASE: Final = "base"
"""The tokenizer source that takes the tokens of the base model."""


@dataclass(frozen=True)
class TokenSource:
    """Where the embedding of one token comes from.

    Attributes:
        model: The model that the embedding is taken from, as the recipe names it; None gives the token zeros.
        token: The token of that model whose embedding is taken. If it is None, `token_id` says which row; if that is
            None too, the row is that of the same token.
        token_id: The row of that model's embedding.
    """

    model: str | None
    token: str | None = None
    token_id: int | None = None


def _parse_source(data: Any) -> TokenSource:
    if isinstance(data, str):
        return TokenSource(data)
    if not isinstance(data, Mapping):
        raise ValueError(f"got {shortened(data)}, need a model, or a mapping with kind: model_token or kind: zero")
    kind = data.get("kind")
    known = {"zero": ("kind",), "model_token": ("kind", "model", "token", "token_id")}
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(
            f"kind: got {shortened(kind)}, need one of model_token, zero{did_you_mean(kind, tuple(known))}"
        )
    for key in data:
        if key not in known[kind]:
            raise ValueError(
                f"unknown key {shortened(key)}{did_you_mean(key, known[kind])}; need {', '.join(known[kind])}"
            )
    if kind == "zero":
        return TokenSource(None)
    model, token, token_id = data.get("model"), data.get("token"), data.get("token_id")
    if not isinstance(model, str):
        raise ValueError(f"model: got {shortened(model)}, need one of the recipe's models")
    if (token is None) == (token_id is None):
        raise ValueError("need exactly one of token and token_id")
    if token is not None and not isinstance(token, str):
        raise ValueError(f"token: got {shortened(token)}, need a token's text in quotes")
    if token_id is not None and (isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0):
        raise ValueError(f"token_id: got {shortened(token_id)}, need a whole number of at least 0")
    return TokenSource(model, token, token_id)


class TokenEntry(BaseModel):
    """An entry of `tokens`. With `force`, the source also replaces the embeddings of models that have the token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Annotated[
        TokenSource | None, PlainValidator(lambda data: None if data is None else _parse_source(data))
    ] = None
    force: bool = False


class TokenizerEntry(BaseModel):
    """The entry `tokenizer` of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = UNION
    tokens: Annotated[
        dict[str, Annotated[TokenEntry, BeforeValidator(lambda data: {} if data is None else data)]],
        BeforeValidator(lambda data: {} if data is None else data),
    ] = {}
    pad_to_multiple_of: Annotated[int, Field(ge=1, strict=True)] | None = None
