"""Options of mergekit-yaml and mergekit-multi on this command line."""

from __future__ import annotations

import importlib

import pytest
from checkpoints import Family, load_model
from conftest import RunCommand
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from resm_kernels import cli
from resm_kernels.flags import FLAGS, repeated, translate


def test_options_that_are_ours_under_another_name() -> None:
    theirs = "recipe.yml out --cuda --out-shard-size 5B -j 4 --out-shard-size=2M --overwrite"
    ours = "recipe.yml out --device cuda --max-shard-size 5000000000 --threads 4 --max-shard-size 2000000 --overwrite"
    assert translate(theirs.split()) == (ours.split(), [])
    assert translate(["--out-shard-size", "5GB"])[0] == ["--max-shard-size", "5GB"]
    assert translate(["a", "--", "--cuda"])[0] == ["a", "--", "--cuda"]
    assert translate(["a", "--out-path", "b", "-I", "c"])[0] == ["a", "b", "--keep-intermediates", "c"]
    assert translate(["a", "--out-path=b", "--intermediate-dir=c"])[0] == ["a", "b", "--keep-intermediates", "c"]


def test_options_without_a_meaning_are_accepted_with_the_reason() -> None:
    ours, notes = translate(["--lazy-unpickle", "a", "--transformers-cache", "somewhere", "--write-threads=3", "-vv"])
    assert ours == ["a"]
    assert notes == [
        "--lazy-unpickle: tensors are always read one by one",
        "--transformers-cache: models of the hub are kept where HF_HUB_CACHE says",
        "--write-threads: one thread keeps up with the disk",
        "-vv: there is no log; --dry-run shows the plan",
    ]


@pytest.mark.parametrize("script", ["run_yaml", "multimerge"])
def test_every_option_of_mergekit_is_understood(script: str) -> None:
    pytest.importorskip("mergekit", reason="mergekit is not installed (test extra)")
    main = importlib.import_module(f"mergekit.scripts.{script}").main

    runner = CliRunner()
    help_text = runner.invoke(cli.app, ["merge", "--help"], env={"COLUMNS": "200"}).output
    known = {name for flag in FLAGS for name in flag.names}
    for parameter in main.params:
        for name in [*parameter.opts, *parameter.secondary_opts]:
            if name.startswith("-"):
                assert name in known or name in help_text, name


def test_command_lines_of_mergekit_users_work(family: Family, run: RunCommand) -> None:
    (family.base_folder / "tokenizer.json").write_text("{}")
    recipe = family.recipe_file()
    arguments = ["merge", recipe, family.out, "--no-copy-tokenizer", "--lazy-unpickle", "--out-shard-size", "30K", "-q"]
    code, _, err = run(*arguments, "--no-write-model-card", "--no-trust-remote-code", "--allow-crimes")
    assert (code, err) == (0, "no effect: --lazy-unpickle: tensors are always read one by one\n")
    assert len(list(family.out.glob("*.safetensors"))) > 2 and len(load_model(family.out)) == 30
    assert not list(family.out.glob("*tokenizer*")) and not (family.out / "README.md").exists()
    for flag, why in [
        ("--unsafe-truncate-embeddings", "tokenizer_source: base"),
        ("--out-shard-size", "got no value, need one"),
    ]:
        code, _, err = run("merge", recipe, family.out, flag)
        assert code == 2 and err.startswith(f"error: {flag}: ") and why in err
    code, _, err = run("info", "--lazy-unpickle")
    assert code == 2 and "no effect" not in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("r o --prompts a b c", "r o --prompts a --prompts b --prompts c"),
        ("r o --prompts a b -q --prompts c", "r o --prompts a --prompts b -q --prompts c"),
        ("--prompts a b --ridge 0.1 r o", "--prompts a --prompts b --ridge 0.1 r o"),
        ("--prompts a b -- r o", "--prompts a --prompts b -- r o"),
        ("r o --prompts", "r o --prompts"),
        ("--prompts=a r o", "--prompts=a r o"),
        ("r o", "r o"),
        ("", ""),
    ],
)
def test_an_option_of_several_values(arguments: str, expected: str) -> None:
    assert repeated(arguments.split(), "--prompts") == expected.split()


@given(st.lists(st.sampled_from(["--prompts", "-q", "--", "a", "b"])))
def test_repeated_options_are_left_as_they_are(arguments: list[str]) -> None:
    once = repeated(arguments, "--prompts")
    assert repeated(once, "--prompts") == once
    assert [a for a in once if a != "--prompts"] == [a for a in arguments if a != "--prompts"]
