"""Files of prompts: what is read, what is refused and how, and the token ids that prompts become."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from experts import ASSISTANT, BEGIN, END, TEMPLATE, TURN_END, UNKNOWN, USER, word_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from resm_kernels.calibrate import CalibrationError, Prompt, Sample, encode_prompts, read_prompts
from resm_kernels.calibrate.prompts import MAX_LINE_BYTES, Message

USER_SAYS = {"role": "user", "content": "w6 w7"}
CHAT = [USER_SAYS, {"role": "assistant", "content": "w9"}]


def lines(path: Path, *entries: Any) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


def test_reads_every_form_in_order(tmp_path: Path) -> None:
    system = {"role": "system", "content": "w8"}
    file = lines(tmp_path / "a.jsonl", {"prompt": " w6 "}, {"text": "é 😀"}, {"prompt": "w6", "response": "w7\n"})
    with open(file, "a") as stream:
        stream.write("\n  \n" + json.dumps({"messages": [system, USER_SAYS]}) + "\r\n" + json.dumps({"messages": CHAT}))
    asked = Message("user", "w6 w7")
    assert read_prompts(file) == [
        Prompt(1, text=" w6 "),
        Prompt(2, text="é 😀"),
        Prompt(3, text="w6", response="w7\n"),
        Prompt(6, messages=(Message("system", "w8"), asked)),
        Prompt(7, messages=(asked,), response="w9"),
    ]
    assert read_prompts(file, 2) == read_prompts(file)[:2]


def test_reads_text_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "a.TXT"
    file.write_bytes(b"\xef\xbb\xbfone \n\n  \r\n{two\xc2\x85x\r\nthree")
    assert read_prompts(file) == [Prompt(1, text="one "), Prompt(4, text="{two\x85x"), Prompt(5, text="three")]


def test_the_limit_bounds_what_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"prompt": "a"}\n{"prompt": "b"}\n\xff')
    assert [p.text for p in read_prompts(file, 2)] == ["a", "b"]
    with pytest.raises(CalibrationError, match="line 3"):
        read_prompts(file)
    with pytest.raises(ValueError, match="max_prompts: got 0, need at least 1"):
        read_prompts(file, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.jsonl: holds no prompt"),
        (b"\n \n\t\n", "a.jsonl: holds no prompt"),
        (b'{"prompt": "a"}\n{"prompt": "\xe9"}', r"line 2: byte 28 of the file is 0xe9, which is not UTF-8"),
        ('{"prompt": "a"}'.encode("utf-16"), r"line 1: byte 0 of the file is 0xff, which is not UTF-8"),
        ('{"prompt": "a"}'.encode("utf-16-le"), r"line 1: byte 1 of the file is 0x00, as in UTF-16"),
        (b'\xef\xbb\xbf{"prompt": "\xff"}', r"line 1: byte 15 of the file is 0xff"),
        (b"hello", "line 1: cannot be read as JSON"),
        (b'{"prompt": "a"} x', "line 1: cannot be read as JSON"),
        (b'{"prompt": ' + b"1" * 9000 + b"}", "line 1: prompt: got a whole number of more than 100 digits"),
        (b'{"prompt": "a", "prompt": "b"}', "line 1: the key .prompt. is there twice"),
        (b'{"prompt": ' + b"[" * 200000 + b"]" * 200000 + b"}", "line 1: is nested more than 64 levels deep"),
        (b'{"prompt": ' + b'{"a":' * 200000, "line 1: is nested more than 64 levels deep"),
        (b"[1]", "line 1: got a list, need an object"),
        (b"null", "line 1: got null, need an object"),
        (b'{"prmpt": "a"}', "line 1: key: got 'prmpt', need one of .*, did you mean 'prompt'?"),
        (b'{"prompt": "a", "id": 3}', "line 1: key: got 'id', need one of prompt, text, messages, response$"),
        (b'{"' + b"prompt" * 200000 + b'": "a"}', "line 1: key: got 'promptprompt...tpromptprompt', need one of"),
        (b"{}", "line 1: got none of prompt, text and messages"),
        (b'{"response": "a"}', "line 1: got none of prompt"),
        (b'{"prompt": "a", "text": "b"}', "line 1: got prompt and text of prompt"),
        (b'{"prompt": 3}', "line 1: prompt: got a number, need a text"),
        (b'{"text": true}', "line 1: text: got a truth value, need a text"),
        (b'{"prompt": ["a"]}', "line 1: prompt: got a list, need a text"),
        (b'{"prompt": "a", "response": null}', "line 1: response: got null, need a text"),
        (b'{"prompt": "a", "response": ""}', "line 1: response: is empty"),
        (b'{"prompt": " \\n"}', "line 1: prompt: is empty"),
        (b'{"prompt": "a\\ud800"}', r"line 1: prompt: character 1 is \\ud800, half of a surrogate pair"),
        (b'{"messages": "a"}', "line 1: messages: got a text, need a list of objects"),
        (b'{"messages": []}', "line 1: messages: got none of the role user, need"),
        (b'{"messages": ["a"]}', r"line 1: messages\[0\]: got a text, need an object"),
        (b'{"messages": [{"role": "user"}]}', r"line 1: messages\[0\]: content is missing"),
        (b'{"messages": [{"role": "usr", "content": "a"}]}', r"role: got 'usr', need one of .*, did you mean 'user'"),
        (b'{"messages": [{"role": ["user"], "content": "a"}]}', "role: got a list, need a text"),
        (b'{"messages": [{"role": "user", "contents": "a"}]}', "key: got 'contents'.*, did you mean 'content'"),
        (b'{"messages": [{"role": "user", "content": " "}]}', r"messages\[0\]: content: is empty"),
        (b'{"messages": [{"role": "user", "content": [1]}]}', r"messages\[0\]: content: got a list"),
        (b'{"messages": [{"role": "system", "content": "a"}]}', "messages: got none of the role user, need"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "none of the role user before the answer"),
        (
            b'{"messages": [{"role": "user", "content": "a"}], "response": "b"}',
            "response: need the answer as a last message",
        ),
    ],
)
def test_errors_name_file_line_and_need(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        read_prompts(file)
    assert str(caught.value).startswith(str(file)) and len(str(caught.value)) < 600


def test_a_long_line_is_refused_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    with open(file, "wb") as stream:
        stream.write(b"one\n")
        stream.truncate(100 * MAX_LINE_BYTES)  # a sparse file: it takes no disk space, and would take 1.6 GB of memory
    with pytest.raises(CalibrationError, match="line 2: is longer than 16777216 bytes; need one prompt a line"):
        read_prompts(file)


def test_what_is_no_file_of_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"a.jsonl: no such file"):
        read_prompts(tmp_path / "a.jsonl")
    (tmp_path / "b.txt").mkdir()
    os.mkfifo(tmp_path / "c.txt")
    for name, kind in (("b.txt", "a folder"), ("c.txt", "a pipe")):
        with pytest.raises(CalibrationError, match=f"{name}: is {kind}, need a regular file"):
            read_prompts(tmp_path / name)
    with pytest.raises(CalibrationError, match=r"need .jsonl or .txt"):
        read_prompts(lines(tmp_path / "d.json", {"prompt": "a"}))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["prompt", "text", "messages", "response", "role", "content"]) | st.text(),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@given(
    st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode()),
    st.sampled_from(["jsonl", "txt"]),
)
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str) -> None:
    file = tmp_path_factory.getbasetemp() / f"any.{suffix}"
    file.write_bytes(content)
    try:
        prompts = read_prompts(file)
    except CalibrationError as error:
        assert str(error).startswith(str(file))
    else:
        assert prompts and all((p.text or p.messages) and p.line >= 1 for p in prompts)


# Token ids.


def encode(
    entries: Sequence[Prompt], template: str | None = TEMPLATE, tokenizer: Any = None, **changes: Any
) -> list[Sample | tuple[int, ...]]:
    options: dict[str, Any] = {"max_answer_tokens": 8, "vocabulary": 64, "end_tokens": (TURN_END, END)}
    limit = changes.pop("max_tokens", 8)
    tokenizer = word_tokenizer(template) if tokenizer is None else tokenizer
    return encode_prompts(entries, tokenizer, Path("p.jsonl"), limit, **options | changes)


def test_ids_of_texts_and_conversations() -> None:
    messages = (Message("user", "w6 w7"),)
    entries = [Prompt(1, text="w6 new w8"), Prompt(2, text="w6", response="w7 w8")]
    entries += [Prompt(3, messages=messages), Prompt(4, messages=messages, response="w9")]
    chat = (USER, 6, 7, TURN_END, ASSISTANT)
    assert encode(entries) == [
        (BEGIN, 6, UNKNOWN, 8),
        Sample((BEGIN, 6, 7, 8, END), 2),  # the tokenizer's own end token, which is not the first of the end tokens
        chat,
        Sample((*chat, 9, TURN_END), 5),
    ]
    assert encode(entries[1:2], end_tokens=(TURN_END,)) == [Sample((BEGIN, 6, 7, 8, TURN_END), 2)]
    assert encode(entries[1:2], end_tokens=()) == [Sample((BEGIN, 6, 7, 8), 2)]
    chatty = TEMPLATE.replace("<end> ", "<end> w60 ")
    assert encode(entries[3:], chatty) == [Sample((USER, 6, 7, TURN_END, 60, ASSISTANT, 9, TURN_END), 6)]
    assert encode(entries[3:], end_tokens=()) == [Sample((*chat, 9, TURN_END), 5)]


def test_conversations_equal_transformers_own_ids() -> None:
    tokenizer = word_tokenizer()
    messages = [USER_SAYS, {"role": "assistant", "content": "w9"}, {"role": "user", "content": "w10"}]
    prompt = Prompt(1, messages=tuple(Message(**m) for m in messages))
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encode([prompt], max_tokens=20) == [tuple(expected)]


REVERSED = "{% if add_generation_prompt %}<|assistant|>{% endif %}{{ messages[-1]['content'] }}"
REFUSING = "{{ raise_exception('no such role') }}"
ASK, ASK_AND_TELL = Prompt(7, messages=(Message("user", "w6"),)), Prompt(7, text="w6 w7", response="w8 w9 w10")


@pytest.mark.parametrize(
    ("prompt", "template", "changes", "message"),
    [
        (ASK, None, {}, "has chat messages, but the tokenizer of .* has no chat template; need one"),
        (ASK, REFUSING, {}, r"the chat template of .* refuses the messages \(no such role\)"),
        (ASK, "{% for %}", {}, "the chat template of .* refuses the messages"),
        (
            Prompt(7, messages=ASK.messages, response="w7"),
            REVERSED,
            {},
            "does not write the answer after its generation",
        ),
        (ASK_AND_TELL, None, {"max_tokens": 2}, r"the prompt has 3 tokens, need at most 2 \(max_prompt_tokens\)"),
        (ASK_AND_TELL, None, {"max_answer_tokens": 3}, r"the answer has 4 tokens, need at most 3 \(max_new_tokens\)"),
        (ASK_AND_TELL, None, {"vocabulary": 7}, "the prompt has the token 7, but the model has only 7"),
        (ASK_AND_TELL, None, {"vocabulary": 8}, "the answer has the token 10, but the model has only 8"),
        (Prompt(7, text="你好 мир"), None, {}, "knows no token of the prompt; need text in its language"),
        (Prompt(7, text="w6", response="мир"), None, {}, "knows no token of the answer"),
        (Prompt(7, text="\u3000"), None, {}, "makes no token of the prompt; need at least one"),
        (ASK, "{{ '' }}", {}, "makes no token of the prompt; need at least one"),
    ],
)
def test_ids_that_do_not_fit_are_refused(prompt: Prompt, template: str | None, changes: Any, message: str) -> None:
    good = Prompt(1, text="w6")
    assert encode([good], template) == [(BEGIN, 6)]
    with pytest.raises(CalibrationError, match=rf"^p.jsonl, line 7: .*{message}"):
        encode([good, prompt], template, **changes)


@pytest.mark.parametrize(("start", "count"), [(0, 2), (2, 2), (3, 2), (-1, 2)])
def test_a_sample_has_a_prompt_and_an_answer(start: int, count: int) -> None:
    with pytest.raises(ValueError, match=f"answer_start: got {start}, need 1 to {count - 1}"):
        Sample(tuple(range(count)), start)
