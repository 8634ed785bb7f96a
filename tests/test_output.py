"""The small files of the output: chat templates, the model card, what becomes of the tokenizer's files."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import jinja2
import pytest
import yaml
from checkpoints import Family, llama_config, save_model

from resm_kernels import __version__
from resm_kernels.checkpoint import read_chat_template
from resm_kernels.engine import MergeError, merge_checkpoints
from resm_kernels.recipe import CHAT_TEMPLATES, load_recipe

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye."},
]


def render(template: str, chat: list[dict[str, str]], **choices: Any) -> str:
    """As transformers renders templates."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)

    def refuse(message: str) -> None:
        raise ValueError(message)

    environment.globals["raise_exception"] = refuse
    return environment.from_string(template).render(messages=chat, bos_token="<s>", eos_token="</s>", **choices)


@pytest.mark.parametrize(
    ("name", "expected", "prompt"),
    [
        (
            "alpaca",
            "Be kind.\n\n### Instruction:\nHello?\n\n### Response:\nHello!\n\n### Instruction:\nBye.\n\n",
            "### Response:\n",
        ),
        (
            "chatml",
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello?<|im_end|>\n"
            "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye.<|im_end|>\n",
            "<|im_start|>assistant\n",
        ),
        (
            "exaone",
            "[|system|]Be kind.[|endofturn|]\n[|user|]Hello?\n[|assistant|]Hello![|endofturn|]\n[|user|]Bye.\n",
            "[|assistant|]",
        ),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHello?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nBye.<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("mistral", "<s> [INST] Be kind.\n\nHello? [/INST] Hello!</s> [INST] Bye. [/INST]", ""),
    ],
)
def test_named_templates_write_conversations_as_their_models_do(name: str, expected: str, prompt: str) -> None:
    template = CHAT_TEMPLATES[name]
    assert render(template, CHAT) == expected
    assert render(template, CHAT, add_generation_prompt=True) == expected + prompt
    assert render(template, CHAT[1:]).count("Be kind.") == 0


def test_mistral_refuses_turns_out_of_order() -> None:
    with pytest.raises(ValueError, match="take turns"):
        render(CHAT_TEMPLATES["mistral"], CHAT[:1] + CHAT[2:])


@pytest.mark.parametrize("name", ["chatml", "mistral"])
def test_templates_equal_mergekits(name: str) -> None:
    folder = pytest.importorskip("mergekit._data.chat_templates", reason="mergekit is not installed (test extra)")
    theirs = resources.files(folder).joinpath(f"{name}.jinja").read_text()
    for chat in (CHAT, CHAT[1:], CHAT[1:3]):
        for prompt in (False, True):
            assert render(CHAT_TEMPLATES[name], chat, add_generation_prompt=prompt) == render(
                theirs, chat, add_generation_prompt=prompt
            )


def test_mergekits_templates_have_the_names_of_ours() -> None:
    folder = pytest.importorskip("mergekit._data.chat_templates", reason="mergekit is not installed (test extra)")
    names = {file.name.removesuffix(".jinja") for file in resources.files(folder).iterdir() if ".jinja" in file.name}
    assert names == set(CHAT_TEMPLATES)


def test_auto_takes_the_template_that_most_models_have(family: Family) -> None:
    (family.base_folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ rare }}"}))
    (family.folders[0] / "chat_template.jinja").write_text("{{ common }}\n")
    named = [{"name": "rag", "template": "{{ rare }}"}, {"name": "default", "template": "{{ common }}"}]
    (family.folders[1] / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    (family.folders[2] / "chat_template.json").write_text(json.dumps({"chat_template": "{{ other }}"}))
    assert [read_chat_template(f) for f in family.folders] == ["{{ common }}\n", "{{ common }}", "{{ other }}"]
    merge_checkpoints(family.recipe(chat_template="auto"), family.out)
    assert (family.out / "chat_template.jinja").read_text() == "{{ common }}"
    assert "chat_template" not in json.loads((family.out / "tokenizer_config.json").read_text())
    merge_checkpoints(family.recipe(), family.out, overwrite=True)
    assert json.loads((family.out / "tokenizer_config.json").read_text()) == {"chat_template": "{{ rare }}"}


def test_card_says_what_was_merged_and_how_to_repeat_it(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(family.root)
    (family.root / "org").mkdir()
    family.folders[0].rename(family.root / "org" / "expert")
    models = [{"model": "org/expert", "parameters": {"density": 0.5}}, {"model": str(family.folders[1])}]
    notes = family.folders[1] / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    (notes / "config.json.metadata").write_text("0123abc\netag\n1.5\n")
    file = family.recipe_file(models=models)
    file.write_text("# a comment of the author's\n" + file.read_text())
    merge_checkpoints(file, family.out)
    card = (family.out / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front == {"base_model": ["org/expert"], "library_name": "transformers", "tags": front["tags"]}
    assert {"merge", "mergekit"} <= set(front["tags"])
    for part in (
        "# out\n",
        __version__,
        f"[TIES](https://arxiv.org/abs/2306.01708), with {family.base_folder} as the base model.",
        "* [org/expert](https://huggingface.co/org/expert)\n",
        f"* {family.folders[1]} (revision 0123abc)\n",
        "```yaml\n# a comment of the author's\n",
    ):
        assert part in card
    # The recipe in the output folder is the one that made it.
    again = family.root / "again"
    merge_checkpoints(family.out / "mergekit_config.yml", again)
    assert (again / "model.safetensors").read_bytes() == (family.out / "model.safetensors").read_bytes()
    merge_checkpoints(family.recipe(models=models[1:]), again, overwrite=True, model_card=False)
    assert not (again / "README.md").exists() and not (again / "mergekit_config.yml").exists()


def test_recipe_from_a_mapping_is_written_as_yaml(family: Family) -> None:
    data = family.recipe(parameters={"weight": [{"filter": "mlp", "value": [0, 1]}, {"value": 2}]})
    assert yaml.safe_load(load_recipe(data).text) == data


def test_tokenizer_is_not_copied_if_not_wanted(family: Family) -> None:
    (family.base_folder / "tokenizer.json").write_text("{}")
    (family.base_folder / "generation_config.json").write_text("{}")
    merge_checkpoints(family.recipe(), family.out)
    assert (family.out / "tokenizer.json").is_file()
    merge_checkpoints(family.recipe(), family.out, overwrite=True, copy_tokenizer=False)
    assert not (family.out / "tokenizer.json").exists() and (family.out / "generation_config.json").is_file()


def test_mixed_architectures_are_merged_only_when_asked_for(family: Family) -> None:
    config = llama_config(architectures=["MistralForCausalLM"], model_type="mistral")
    save_model(family.folders[1], family.experts[1], config)
    with pytest.raises(MergeError, match="another architecture: model_type is 'mistral', need 'llama'"):
        merge_checkpoints(family.recipe(), family.out)
    merge_checkpoints(family.recipe(), family.out, mixed_architectures=True)
    assert json.loads((family.out / "config.json").read_text())["model_type"] == "llama"
