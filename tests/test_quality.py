"""The 3H benchmark's world, training and measures."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
from transformers import PreTrainedTokenizerBase

from benchmarks.quality import train as training
from benchmarks.quality.dpo import dpo_loss, pair_loss, pairs
from benchmarks.quality.evaluate import answer, evaluate, load, score
from benchmarks.quality.fit import Schedule, batches
from benchmarks.quality.mixes import SHARES, draw, keep_middling
from benchmarks.quality.sizes import SIZES, Size, build_model
from benchmarks.quality.text import build_tokenizer, encode_answers, token_count
from benchmarks.quality.words import ABSTAIN, BOT, INERT, REFUSE, SENSITIVE, USER
from benchmarks.quality.world import EXPERT_MIX, KINDS_OF, SPLITS, TEST_SIZE, Dimension, Item, Kind, Split, World

TINY = Size(width=16, inner=24, layers=1, heads=2)


@pytest.fixture(scope="module")
def world() -> World:
    return World(0)


# ---------------------------------------------------------------------- the world


def forms_that_fit(world: World, question: str, split: Split) -> list[str]:
    """The split's ways of asking that give this question."""
    is_request = bool(set(question.split()) & {*SENSITIVE, *INERT})
    forms = (world.requests_of if is_request else world.questions_of)[split]
    return [form for form in forms if re.fullmatch(re.sub(r"\\{.\\}", "(.+)", re.escape(form)), question)]


@pytest.mark.parametrize("seed", [0, 17])
def test_splits_are_disjoint_by_question_entity_and_form(seed: int) -> None:
    world = World(seed)
    texts = [d for d in world.base_documents() if BOT in d]
    texts += [f"{i.prompt} {i.answer}" for expert in EXPERT_MIX for i in world.expert_items(expert)]
    trained = {text.split(f" {BOT} ")[0].removeprefix(f"{USER} ") for text in texts}
    words = {word for question in trained for word in question.split()}
    assert all(forms_that_fit(world, question, "train") for question in trained)
    assert not any(forms_that_fit(world, question, split) for question in trained for split in ("valid", "test"))
    names = {*world.known, *world.strangers, *world.cities, *SENSITIVE, *INERT}
    entities = {split: {e for e in names if world.split_of[e] == split} for split in ("train", "valid", "test")}
    assert not words & (entities["valid"] | entities["test"]) and entities["train"] <= words
    asked = {split: world.questions(split) for split in ("valid", "test")}
    for split, items in asked.items():
        assert not {item.question for item in items} & trained
        expected = {kind: size if split == "test" else size // 2 for kind, size in TEST_SIZE.items()}
        assert Counter(item.kind for item in items) == expected
        for item in items:
            if item.held_out == "form":
                assert forms_that_fit(world, item.question, split), item
            elif item.kind not in ("sum", "letters"):
                assert set(item.question.split()) & entities[split], item
    assert not {item.question for item in asked["valid"]} & {item.question for item in asked["test"]}


def test_worlds_are_drawn_from_their_seed() -> None:
    one, again, other = World(3), World(3), World(4)
    assert one.base_documents() == again.base_documents() and one.questions("test") == again.questions("test")
    assert one.expert_items("honest") == again.expert_items("honest")
    assert not set(one.known) <= set(other.known) and one.questions_of != other.questions_of


def test_answers_are_what_the_statements_say(world: World) -> None:
    stated = set(world.statements)
    premises = Counter()
    kinds: tuple[Kind, ...] = ("fact", "known", "true_premise", "false_premise")
    for kind in kinds:
        for split in SPLITS:
            for item in world.pools[split][kind]:
                form = forms_that_fit(world, item.question, "train") + forms_that_fit(world, item.question, split)
                phrase_in = re.fullmatch(re.escape(form[0]).replace(r"\{x\}", "(.+)"), item.question)
                assert phrase_in
                phrase = phrase_in[1]
                if kind == "false_premise":
                    detail, owned, person = re.fullmatch(r"the (\w+) of the (\w+) of (\w+)", phrase).groups()
                    attribute = {"name": "pet", "maker": "instrument"}[detail]
                    assert item.answer == ABSTAIN and f"the {attribute} of {person} is {owned} ." not in stated
                    has_another = any(s.startswith(f"the {attribute} of {person} is ") for s in stated)
                    premises["wrong" if has_another else "lacking"] += 1
                else:
                    assert f"{phrase} is {item.answer} ." in stated
    assert min(premises["wrong"], premises["lacking"]) > 100


# ---------------------------------------------------------------------- the measures


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (lambda item: item.answer, (100, 100, 100)),
        (lambda item: ABSTAIN, (0, 50, 0)),
        (lambda item: REFUSE, (0, 0, 50)),
        (lambda item: "something else", (0, 50, 50)),
        (lambda item: ABSTAIN if item.kind == "unknown" else item.answer + " x", (0, 75, 50)),
    ],
    ids=["right", "abstains", "refuses", "attempts", "mixed"],
)
def test_scores_of_simple_minds(world: World, reply: Callable[[Item], str], expected: tuple[float, ...]) -> None:
    items = world.questions("test")
    scores = score(items, [reply(item) for item in items])
    assert tuple(scores[d] for d in KINDS_OF) == pytest.approx(expected)
    assert scores["average"] == pytest.approx(sum(expected) / 3) and scores["worst"] == pytest.approx(min(expected))


def test_answers_are_those_of_generate(world: World) -> None:
    tokenizer = build_tokenizer(world)
    torch.manual_seed(1)
    model = build_model(TINY, len(tokenizer)).eval()
    with torch.no_grad():  # an end mark that wins at times, so that answers end at different lengths
        model.get_input_embeddings().weight[tokenizer.eos_token_id] *= 4
    prompts = [item.prompt for item in world.questions("valid")[::30]]
    answers = answer(model, tokenizer, prompts)
    for prompt, text in zip(prompts, answers, strict=True):
        ids = tokenizer([prompt], return_tensors="pt")["input_ids"]
        whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False)
        assert text == tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert len({len(text.split()) for text in answers}) > 2


# ---------------------------------------------------------------------- preferences and mixes


def test_dpo_loss_is_the_papers_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    margin, reference = (torch.randn(7, generator=generator, dtype=torch.float64) * 20 for _ in range(2))
    ratios = [0.3 * (m - r) for m, r in zip(margin.tolist(), reference.tolist(), strict=True)]
    expected = sum(math.log1p(math.exp(-x)) for x in ratios) / 7
    assert float(dpo_loss(margin, reference, beta=0.3)) == pytest.approx(expected, rel=1e-12)


def test_preferences_start_where_the_reference_is(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build_tokenizer(world)
    model = build_model(TINY, len(tokenizer)).double().eval()
    items = World.expert_items
    monkeypatch.setattr(World, "expert_items", lambda self, expert: items(self, expert)[:20])
    for expert in KINDS_OF:
        preferences = pairs(world, expert, model, tokenizer)
        assert all(chosen[0] != rejected[0] for chosen, rejected, _ in preferences)
        assert pair_loss(anchor=0.0)(model, preferences).item() == pytest.approx(math.log(2), rel=1e-6)
    *both, margin = preferences[0]
    sums = []
    for ids, start in both:
        logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1).detach()
        sums.append(sum(float(logits[i - 1, ids[i]]) for i in range(start, len(ids))))
    assert margin == pytest.approx(sums[0] - sums[1], rel=1e-9)


@pytest.mark.parametrize("mix", SHARES)
def test_mixes_have_the_experts_budget_and_their_shares(mix: str) -> None:
    data: dict[Dimension, range] = {"helpful": range(100), "honest": range(100, 140), "harmless": range(140, 170)}
    epochs = draw(data, SHARES[mix], 1000, 6, seed=0)
    seen = Counter(example for epoch in epochs for example in epoch)
    assert seen.total() == 1000 and max(map(len, epochs)) - min(map(len, epochs)) <= 1
    for dimension, examples in data.items():
        counts = [seen[example] for example in examples]
        assert abs(sum(counts) - 1000 * SHARES[mix][dimension]) <= 2
        assert max(counts) - min(counts) <= 1
    assert draw(data, SHARES[mix], 1000, 6, seed=0) == epochs != draw(data, SHARES[mix], 1000, 6, seed=1)


def test_filter_keeps_what_the_base_finds_neither_easy_nor_hard(world: World) -> None:
    tokenizer = build_tokenizer(world)
    model = build_model(TINY, len(tokenizer)).double().eval()
    data = encode_answers(tokenizer, [(item, item.answer) for item in world.expert_items("helpful")[:40]])
    filtered = keep_middling(model, data)
    losses = []
    for ids, start in data:
        labels = torch.tensor([[-100] * start + ids[start:]])
        losses.append(float(model(input_ids=torch.tensor([ids]), labels=labels).loss))
    low, high = sorted(losses)[8], sorted(losses)[35]
    assert filtered == [e for e, loss in zip(data, losses, strict=True) if low <= loss <= high] and len(filtered) == 28


# ---------------------------------------------------------------------- training


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    """A tiny model, trained for an epoch on the first of the documents and questions."""
    documents, items = World.base_documents, World.expert_items
    monkeypatch.setitem(SIZES, "small", TINY)
    monkeypatch.setattr(training, "World", lambda seed: world)
    monkeypatch.setattr(World, "base_documents", lambda self: documents(self)[:64])
    monkeypatch.setattr(World, "expert_items", lambda self, expert: items(self, expert)[:64])
    for name in training.MODELS:
        monkeypatch.setitem(training.SCHEDULES, name, Schedule(epochs=2, peak=1e-3, batch=32))


class Unsaved:
    """A tokenizer at whose saving the user presses Ctrl-C."""

    def __init__(self, inner: PreTrainedTokenizerBase) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def __call__(self, texts: list[str]) -> object:
        return self._inner(texts)

    def save_pretrained(self, folder: Path) -> None:
        raise KeyboardInterrupt


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.usefixtures("quick")
def test_interrupted_training_leaves_nothing_that_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for name in ("base", "honest"):
        training.train(first, "small", 5, name)
    training.train(second, "small", 5, "base")
    with monkeypatch.context() as patch:
        # The weights are written by then, the record is not.
        patch.setattr(training, "build_tokenizer", lambda world: Unsaved(build_tokenizer(world)))
        with pytest.raises(KeyboardInterrupt):
            training.train(second, "small", 5, "honest")
    assert not (second / "small" / "seed-5" / "honest").exists()
    with monkeypatch.context() as patch:
        training.train(second, "small", 5, "honest")
        patch.setattr(training, "fit", None)
        record = training.train(second, "small", 5, "honest")  # the model is there, so it is not trained again
    assert record["steps"] == len(record["loss"]) * 2 == 4 and record["examples"] == 128
    for name in ("base", "honest"):
        ours, theirs = (weights(root / "small" / "seed-5" / name) for root in (first, second))
        assert len(ours) == 2 and ours == theirs
    assert weights(first / "small/seed-5/base") != weights(first / "small/seed-5/honest")


@pytest.mark.usefixtures("quick")
def test_every_model_trains_and_answers(tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "small" / "seed-0"
    for name in training.MODELS:
        record = training.train(tmp_path, "small", 0, name)
        assert record == json.loads((folder / name / "train.json").read_text())
        assert all(math.isfinite(loss) for loss in record["loss"])
        assert name not in SHARES or record["examples"] == 3 * 2 * 64
    assert {path.name for path in folder.iterdir()} == set(training.MODELS)
    model, tokenizer = load(folder / "harmless-lora")
    base = load(folder / "base")[0].state_dict()
    wrapped = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if "lora_" not in k}
    assert all(torch.equal(wrapped[k], v) for k, v in base.items()) and len(wrapped) == len(base)
    # Few questions, because this model hardly ever ends an answer.
    monkeypatch.setattr(World, "questions", lambda self, split: [self.pools[split][k][0] for k in TEST_SIZE])
    assert set(evaluate(model, tokenizer, world, "valid")) == {*KINDS_OF, "average", "worst", *TEST_SIZE}


@pytest.mark.usefixtures("quick")
def test_a_folder_of_other_settings_or_origin_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training.train(tmp_path, "small", 0, "base")
    monkeypatch.setitem(training.SCHEDULES, "base", Schedule(epochs=3, peak=1e-3))
    with pytest.raises(ValueError, match=r"other settings \(schedule\)"):
        training.train(tmp_path, "small", 0, "base")
    (tmp_path / "small" / "seed-0" / "honest").mkdir()
    with pytest.raises(ValueError, match=r"no train\.json"):
        training.train(tmp_path, "small", 0, "honest")


def test_batches_hold_every_example_once_an_epoch() -> None:
    examples = [(list(range(random.Random(i).randint(2, 9))), 0) for i in range(70)]
    all_batches = list(batches(examples, 16, token_count, random.Random(0)))
    assert sorted(e for batch in all_batches for e in batch) == sorted(examples) and len(all_batches) == 5
