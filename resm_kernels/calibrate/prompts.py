"""Reads files of prompts, and turns prompts into token ids.

A file is either plain text (`.txt`, one prompt a line) or JSON lines (`.jsonl`, one object a line), in UTF-8; blank
lines are skipped. An object is one of

    {"prompt": "…"}        or {"text": "…"}: text that the model continues
    {"messages": [{"role": "user", "content": "…"}, …]}: a conversation, for the tokenizer's chat template

and may bring its answer, which the expert is then not asked for: `"response": "…"` beside a prompt, or a last message
of the role `assistant`.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple

from resm_kernels.calibrate.errors import CalibrationError
from resm_kernels.calibrate.models import quiet_transformers
from resm_kernels.files import first_line, open_regular, parse_json
from resm_kernels.suggestions import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_LINE_BYTES: Final = 1 << 24
"""The longest line that is read, in bytes: far more than any prompt, and little memory."""

_SUFFIXES: Final = (".jsonl", ".txt")
_TEXT_KEYS: Final = ("prompt", "text")
_KEYS: Final = (*_TEXT_KEYS, "messages", "response")
_ROLES: Final = ("system", "user", "assistant")
_LONG_NAME: Final = 40
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Sample:
    """One prompt with its answer as token ids.

    The model reads `tokens[:-1]`, and position p predicts `tokens[p + 1]`. The answer positions are those that predict
    a token of the answer: answer_start − 1 to len(tokens) − 2.

    Attributes:
        tokens: The ids of prompt and answer; the end token, if the answer has one, is the last of them.
        answer_start: The position of the answer's first token, from 1 to len(tokens) − 1.
    """

    tokens: tuple[int, ...]
    answer_start: int

    def __post_init__(self) -> None:
        if not 1 <= self.answer_start < len(self.tokens):
            raise ValueError(f"answer_start: got {self.answer_start}, need 1 to {len(self.tokens) - 1}")


class Message(NamedTuple):
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """One prompt as a file states it: either a text or messages.

    Attributes:
        line: The line in its file, from 1.
        text: The text that a model continues; None for a conversation.
        messages: The conversation up to the message that is to be answered; empty for a text.
        response: The answer that the file brings; None if the expert is to answer.
    """

    line: int
    text: str | None = None
    messages: tuple[Message, ...] = ()
    response: str | None = None


def read_prompts(path: Path, max_prompts: int | None = None) -> list[Prompt]:
    """Read the prompts of a file, in its order.

    Args:
        path: A `.jsonl` or `.txt` file; the module's description says what it holds.
        max_prompts: Read the file's first prompts only, so many; None reads all.

    Raises:
        CalibrationError: The file is missing, is no regular file or has another suffix; it is not UTF-8; it holds no
            prompt, an empty one, or a line of more than 16 MiB; a line is no JSON object, or has unknown keys, values
            of another type, or a conversation without a message from the user. The message names file and line.
        ValueError: `max_prompts` is less than 1.
    """
    if max_prompts is not None and max_prompts < 1:
        raise ValueError(f"max_prompts: got {max_prompts}, need at least 1")
    parse = _PARSERS.get(path.suffix.lower())
    if parse is None:
        raise CalibrationError(f"{path}: got a file name that ends in {path.suffix!r}, need {' or '.join(_SUFFIXES)}")
    prompts: list[Prompt] = []
    try:
        with os.fdopen(open_regular(path, CalibrationError, "need a file of prompts"), "rb") as stream:
            for number, line in _lines(stream, path):
                if line.strip():
                    prompts.append(parse(number, line, f"{path}, line {number}"))
                if len(prompts) == max_prompts:
                    break
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error.strerror or error}; need a file of prompts") from error
    if not prompts:
        raise CalibrationError(f"{path}: holds no prompt; need at least one line that is not blank")
    return prompts


def _lines(stream: BinaryIO, path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file with their numbers from 1, without their ends."""
    number, position = 0, 0
    while raw := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(raw) > MAX_LINE_BYTES:
            raise CalibrationError(
                f"{path}, line {number}: is longer than {MAX_LINE_BYTES} bytes; need one prompt a line"
            )
        mark = len(_BYTE_ORDER_MARK) if number == 1 and raw.startswith(_BYTE_ORDER_MARK) else 0
        try:
            line = raw[mark:].decode()
        except UnicodeDecodeError as error:
            at = position + mark + error.start
            raise CalibrationError(
                f"{path}, line {number}: byte {at} of the file is 0x{raw[mark + error.start]:02x}, which is not UTF-8 "
                f"({error.reason}); save the file as UTF-8"
            ) from None
        if "\0" in line:
            at = position + raw.index(0)
            raise CalibrationError(
                f"{path}, line {number}: byte {at} of the file is 0x00, as in UTF-16 or a binary file; save it as UTF-8"
            )
        position += len(raw)
        yield number, line.removesuffix("\n").removesuffix("\r")


def _parse_text(number: int, line: str, where: str) -> Prompt:
    return Prompt(number, text=line)


def _parse_json(number: int, line: str, where: str) -> Prompt:
    """Return the prompt that a line of JSON states."""
    entry = parse_json(line, where, CalibrationError)
    _check_object(entry, where)
    for key in entry:
        _check_known(key, _KEYS, f"{where}: key")
    given = [key for key in (*_TEXT_KEYS, "messages") if key in entry]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise CalibrationError(f"{where}: got {got} of prompt, text and messages, need exactly one")
    key = given[0]
    if key == "messages":
        if "response" in entry:
            raise CalibrationError(f"{where}: response: need the answer as a last message of the role assistant")
        return _conversation(number, entry[key], where)
    response = _text(entry["response"], f"{where}: response") if "response" in entry else None
    return Prompt(number, text=_text(entry[key], f"{where}: {key}"), response=response)


_PARSERS: Final = {".jsonl": _parse_json, ".txt": _parse_text}


def _conversation(number: int, entries: Any, where: str) -> Prompt:
    """Return the prompt that a list of messages states."""
    if not isinstance(entries, list):
        raise CalibrationError(f"{where}: messages: got {_kind(entries)}, need a list of objects")
    messages = [_message(entry, f"{where}: messages[{i}]") for i, entry in enumerate(entries)]
    response = messages.pop().content if messages and messages[-1].role == "assistant" else None
    if all(message.role != "user" for message in messages):
        before = " before the answer" if response is not None else ""
        raise CalibrationError(f"{where}: messages: got none of the role user{before}, need at least one")
    return Prompt(number, messages=tuple(messages), response=response)


def _message(entry: Any, where: str) -> Message:
    _check_object(entry, where)
    for key in entry:
        _check_known(key, Message._fields, f"{where}: key")
    for key in Message._fields:
        if key not in entry:
            raise CalibrationError(f"{where}: {key} is missing; need role and content")
    role = _text(entry["role"], f"{where}: role")
    _check_known(role, _ROLES, f"{where}: role")
    return Message(role, _text(entry["content"], f"{where}: content"))


def _check_known(name: str, known: Sequence[str], where: str) -> None:
    if name not in known:
        # A file may hold names of any length.
        hint = did_you_mean(name, known) if len(name) < _LONG_NAME else ""
        raise CalibrationError(f"{where}: got {reprlib.repr(name)}, need one of {', '.join(known)}{hint}")


def _check_object(entry: Any, where: str) -> None:
    if not isinstance(entry, dict):
        raise CalibrationError(f"{where}: got {_kind(entry)}, need an object")


def _text(value: Any, where: str) -> str:
    """Return a text that is not empty."""
    if not isinstance(value, str):
        raise CalibrationError(f"{where}: got {_kind(value)}, need a text")
    if not value.strip():
        raise CalibrationError(f"{where}: is empty, need a text")
    return value


def _kind(value: Any) -> str:
    """Return what JSON calls a value's type."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def encode_prompts(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    max_tokens: int,
    *,
    max_answer_tokens: int,
    vocabulary: int,
    end_tokens: Sequence[int],
) -> list[Sample | tuple[int, ...]]:
    """Return for each prompt its token ids, or a `Sample` if the file brings its answer too.

    A text is tokenized as it is, with the special tokens that the tokenizer adds; one that begins with the begin token
    itself, as what a chat template wrote does, gets no second one. A conversation is written by the
    tokenizer's chat template with its generation prompt, and tokenized without further special tokens.

    The answer of a text is tokenized for itself, without special tokens, and the end token is appended if there is
    one: the tokenizer's if it is among `end_tokens`, else the first of these. The answer of a conversation is what the
    chat template writes for the last message after the generation prompt, up to the first end token.

    Args:
        prompts: What `read_prompts` returned.
        tokenizer: The model's tokenizer.
        path: The prompts' file, for errors.
        max_tokens: The number of tokens that a prompt may have. Longer ones are errors and not cut, because what is
            cut off would often be the question.
        max_answer_tokens: The number of tokens that an answer from the file may have.
        vocabulary: The number of the model's tokens: the rows of its embedding.
        end_tokens: The ids that end an answer; may be empty.

    Raises:
        CalibrationError: The tokenizer has no chat template that takes the messages; a prompt or answer is too long,
            has no token, has only unknown ones, or has an id beyond the vocabulary. The message names file and line.

    Deterministic.
    """
    with quiet_transformers():  # which would warn of prompts that are longer than the tokenizer's limit
        encoder = _Encoder(tokenizer, max_tokens, max_answer_tokens, vocabulary, tuple(end_tokens))
        return [encoder.encode(prompt, f"{path}, line {prompt.line}") for prompt in prompts]


class _Encoder:
    """Turns prompts into token ids and checks these."""

    def __init__(
        self, tokenizer: Any, max_tokens: int, max_answer_tokens: int, vocabulary: int, end_tokens: tuple[int, ...]
    ) -> None:
        self._tokenizer = tokenizer
        self._limits = {"prompt": ("max_prompt_tokens", max_tokens), "answer": ("max_new_tokens", max_answer_tokens)}
        self._vocabulary = vocabulary
        self._ends = end_tokens
        own = tokenizer.eos_token_id
        self._end = (own,) if own in end_tokens else end_tokens[:1]
        self._nothing = self._ids("", special=True)
        self._special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}

    def _ids(self, text: str, *, special: bool) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=special)["input_ids"])

    def encode(self, prompt: Prompt, where: str) -> Sample | tuple[int, ...]:
        if prompt.text is not None:
            ids = self._ids(prompt.text, special=True)
            begin = self._tokenizer.bos_token_id
            if begin is not None and ids[:2] == (begin, begin):  # the text has its own
                ids = ids[1:]
            answer = None if prompt.response is None else self._ids(prompt.response, special=False) + self._end
        else:
            text = self._render(prompt.messages, where, generation=True)
            ids = self._ids(text, special=False)
            answer = None if prompt.response is None else self._chat_answer(prompt, text, where)
        self._check(ids, where, "prompt")
        if ids == self._nothing:
            raise CalibrationError(
                f"{where}: the tokenizer of {self._name} makes no token of the prompt; need at least one"
            )
        if answer is None:
            return ids
        self._check(answer, where, "answer")
        return Sample(ids + answer, len(ids))

    @property
    def _name(self) -> str:
        return str(self._tokenizer.name_or_path)

    def _render(self, messages: Sequence[Message], where: str, *, generation: bool) -> str:
        """Return the text that the chat template writes for the messages."""
        if self._tokenizer.chat_template is None:
            raise CalibrationError(
                f"{where}: has chat messages, but the tokenizer of {self._name} has no chat template; need one, or the "
                'prompt as text: {"prompt": "…"}'
            )
        entries = [message._asdict() for message in messages]
        try:
            return str(self._tokenizer.apply_chat_template(entries, add_generation_prompt=generation, tokenize=False))
        except Exception as error:  # templates raise whatever their expressions do
            raise CalibrationError(
                f"{where}: the chat template of {self._name} refuses the messages ({first_line(error)}); need "
                "ones that it takes"
            ) from error

    def _chat_answer(self, prompt: Prompt, text: str, where: str) -> tuple[int, ...]:
        """Return the ids of a conversation's answer; `text` is the conversation before it."""
        messages = (*prompt.messages, Message("assistant", str(prompt.response)))
        whole = self._render(messages, where, generation=False)
        if not whole.startswith(text):
            raise CalibrationError(
                f"{where}: the chat template of {self._name} does not write the answer after its generation prompt; "
                'need prompt and response as text: {"prompt": "…", "response": "…"}'
            )
        ids = self._ids(whole[len(text) :], special=False)
        end = next((i for i, token in enumerate(ids) if token in self._ends), len(ids))
        return ids[: end + 1]

    def _check(self, ids: tuple[int, ...], where: str, part: str) -> None:
        option, limit = self._limits[part]
        if not ids:
            raise CalibrationError(
                f"{where}: the tokenizer of {self._name} makes no token of the {part}; need at least one"
            )
        if len(ids) > limit:
            raise CalibrationError(f"{where}: the {part} has {len(ids)} tokens, need at most {limit} ({option})")
        if max(ids) >= self._vocabulary:
            raise CalibrationError(
                f"{where}: the {part} has the token {max(ids)}, but the model has only {self._vocabulary}; need the "
                f"model's own tokenizer, got that of {self._name}"
            )
        content = {token for token in ids if token not in self._special}
        if content == {self._tokenizer.unk_token_id}:
            raise CalibrationError(
                f"{where}: the tokenizer of {self._name} knows no token of the {part}; need text in its language"
            )
