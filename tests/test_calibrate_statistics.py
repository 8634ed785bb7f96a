"""Statistics of models on prompts: against sums over single samples, against fusion-bench, and into merges."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import load_model, save_adapter
from conftest import RunCommand
from experts import BEGIN, ENDS, WORDS, greedy, save_expert, transformers, word_tokenizer
from inputs import randn, relative
from oracles import fusion_bench
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from resm_kernels.calibrate import CalibrationError, Sample
from resm_kernels.calibrate.fisher import fisher_information
from resm_kernels.calibrate.grams import gather_grams
from resm_kernels.calibrate.statistics import compute_statistics
from resm_kernels.checkpoint import CheckpointError
from resm_kernels.checkpoint.statistics import StatisticsReader
from resm_kernels.engine import merge_checkpoints
from resm_kernels.methods import tensor_key
from resm_kernels.recipe import RecipeError

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("Llama", "GPT2", "Phi3", "Gemma2")
TIED = {"tie_word_embeddings": True}


def write_prompts(file: Path, count: int = 12, seed: int = 0, *, answered: bool = False) -> list[tuple[int, ...]]:
    """A file of random prompts of 1 to 7 words, one of which may bring its answer, and their token ids."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(6, 64) for _ in range(rng.randint(1, 7))] for _ in range(count)]
    lines = [{"prompt": " ".join(f"w{i}" for i in ids)} for ids in prompts]
    if answered:
        lines[1]["response"] = "w9 w10"
    file.write_text("\n".join(map(json.dumps, lines)))
    return [(BEGIN, *ids) for ids in prompts]


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def samples_of(folder: Path, prompts: list[tuple[int, ...]], max_new_tokens: int) -> list[Sample]:
    """Prompts with the model's greedy answers, and the answer that the file brings."""
    model = loaded(folder)
    answers = [greedy(model, ids, max_new_tokens, ENDS) for ids in prompts]
    answers[1] = (9, 10, 2)
    return [Sample(p + a, len(p)) for p, a in zip(prompts, answers, strict=True)]


def read(file: Path) -> tuple[dict[str, Tensor], StatisticsReader]:
    """The statistic of every weight that has one, by its name, and the reader."""
    with StatisticsReader(file) as reader:
        infos = {name: reader.statistic(name) for name in reader.names}
        return {name: reader.read_info(info) for name, info in infos.items() if info is not None}, reader


def gram_oracle(folder: Path, samples: list[Sample]) -> dict[str, Tensor]:
    """Mean of x·xᵀ over the inputs of every linear layer in float64, one sample after another."""
    model, sums = loaded(folder), dict[str, Tensor]()
    embedding = model.get_input_embeddings().weight

    def hook(name: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1]).double()
            sums[name] = sums.get(name, torch.zeros(())) + x.mT @ x

        return add

    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module.weight is not embedding:
            module.register_forward_pre_hook(hook(f"{name}.weight"))
    for sample in samples:
        model(input_ids=torch.tensor([sample.tokens[:-1]]), use_cache=False)
    count = sum(len(sample.tokens) - 1 for sample in samples)
    return {name: total / count for name, total in sums.items()}


@pytest.mark.parametrize(("kind", "changes"), [*((kind, {}) for kind in KINDS), ("Llama", TIED)])
def test_gram_matrices_are_means_over_all_inputs(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    folder, out = save_expert(tmp_path / "model", kind, **changes), tmp_path / "a.safetensors"
    prompts = write_prompts(tmp_path / "a.jsonl", answered=True)
    report = compute_statistics(folder, out, tmp_path / "a.jsonl", max_new_tokens=5)
    samples = samples_of(folder, prompts, 5)
    grams, reader = read(out)
    expected = gram_oracle(folder, samples)
    assert grams.keys() == expected.keys() and ("lm_head.weight" in grams) == (
        kind in ("Llama", "Phi3") and not changes
    )
    for name, gram in grams.items():
        assert gram.dtype == torch.float32 and relative(gram, expected[name]) <= 1e-5, name
    tokens = sum(len(sample.tokens) - 1 for sample in samples)
    assert (report.tokens, report.prompts, report.weights) == (tokens, 12, len(grams))
    assert (reader.about.tokens, reader.about.prompts, reader.about.kind) == (tokens, 12, "gram")
    assert report.unmatched == () and report.bytes_written == out.stat().st_size
    assert f"{len(grams)} weights from 12 prompts, {tokens:,} tokens" in str(report)


def test_layers_with_one_input_share_a_matrix_and_conv1d_is_transposed(tmp_path: Path) -> None:
    write_prompts(tmp_path / "a.jsonl")
    for kind in ("Llama", "GPT2"):
        folder = save_expert(tmp_path / kind, kind)
        compute_statistics(folder, tmp_path / f"{kind}.safetensors", tmp_path / "a.jsonl", max_new_tokens=2)
    _, llama = read(tmp_path / "Llama.safetensors")
    layer = "model.layers.1."
    shared = {f"{layer}self_attn.{n}_proj.weight": f"{layer}self_attn.q_proj.weight" for n in "kv"}
    shared |= {f"{layer}mlp.up_proj.weight": f"{layer}mlp.gate_proj.weight"}
    assert {k: v for k, v in llama.about.shared.items() if k.startswith(layer)} == shared
    assert len(llama.tensors) == 2 * 4 + 1 and llama.about.transposed == ()
    _, gpt2 = read(tmp_path / "GPT2.safetensors")
    assert set(gpt2.about.transposed) == set(gpt2.names) and gpt2.about.shared == {}


def test_padding_and_batches_change_nothing_but_rounding(tmp_path: Path) -> None:
    folder = save_expert(tmp_path / "model")
    write_prompts(tmp_path / "a.jsonl")
    for size in (1, 30, 4096):
        compute_statistics(
            folder, tmp_path / f"{size}.safetensors", tmp_path / "a.jsonl", max_new_tokens=1, batch_tokens=size
        )
    single, *others = (read(tmp_path / f"{size}.safetensors")[0] for size in (1, 30, 4096))
    for grams in others:
        assert all(relative(gram, single[name]) <= 1e-5 for name, gram in grams.items())


def test_repeated_runs_have_the_same_bits(tmp_path: Path) -> None:
    folder = save_expert(tmp_path / "model")
    write_prompts(tmp_path / "a.jsonl")
    for kind in ("gram", "fisher"):
        files = [tmp_path / f"{i}.safetensors" for i in range(2)]
        for file in files:
            compute_statistics(folder, file, tmp_path / "a.jsonl", kind=kind, max_new_tokens=3, overwrite=True)
        assert files[0].read_bytes() == files[1].read_bytes()
    compute_statistics(
        folder, files[1], tmp_path / "a.jsonl", kind="fisher", max_new_tokens=3, random_seed=1, overwrite=True
    )
    assert files[0].read_bytes() != files[1].read_bytes()


class FusionBenchTrainer:
    """What fusion-bench's `regmean_merging` asks of a trainer: batches of one prompt each."""

    _train_batch_size = 1

    def __init__(self, prompts: list[tuple[int, ...]]) -> None:
        self.batches = [{"input_ids": torch.tensor([ids])} for ids in prompts]

    def get_train_dataloader(self) -> list[dict[str, Tensor]]:
        return self.batches

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return inputs


@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_models_merge_as_by_fusion_bench(tmp_path: Path, ratio: float) -> None:
    module = fusion_bench("regmean.regmean")
    models, trainers, entries = [], [], []
    for t in range(2):
        folder, prompts = save_expert(tmp_path / f"expert{t}", seed=t), tmp_path / f"{t}.txt"
        ids = write_prompts(tmp_path / "prompts.jsonl", count=60, seed=t)
        prompts.write_text("\n".join(" ".join(f"w{i}" for i in row[1:]) for row in ids))
        models.append(loaded(folder).double())
        trainers.append(FusionBenchTrainer(ids))
        file = tmp_path / f"{t}.safetensors"
        compute_statistics(folder, file, prompts, max_new_tokens=1)  # reads prompts alone
        entries.append({"model": str(folder), "statistics": str(file)})
    expected = module.regmean_merging(models, trainers, [], [60, 60], ratio)
    parameters = {"off_diagonal": ratio, "ridge": 0.0}
    merge_checkpoints({"merge_method": "regmean", "models": entries, "parameters": parameters}, tmp_path / "out")
    merged = load_model(tmp_path / "out")
    assert merged.keys() == expected.keys()
    # The systems' condition multiplies the rounding of inputs and statistics in fp32.
    for name, tensor in merged.items():
        assert relative(tensor, expected[name].detach()) <= (1e-4 if ratio < 1 else 1e-2), name
    average = (models[0].lm_head.weight + models[1].lm_head.weight).detach() / 2
    assert relative(merged["lm_head.weight"], average) > 0.05


def test_fisher_informations_are_means_of_squared_gradients(tmp_path: Path) -> None:
    folder, out = save_expert(tmp_path / "model", **TIED), tmp_path / "a.safetensors"
    prompts = write_prompts(tmp_path / "a.jsonl", count=5, answered=True)
    report = compute_statistics(folder, out, tmp_path / "a.jsonl", kind="fisher", max_new_tokens=4, random_seed=3)
    fishers, reader = read(out)
    model = loaded(folder)
    samples = samples_of(folder, prompts, 4)
    expected = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    for i, sample in enumerate(samples):
        logits = model(input_ids=torch.tensor([sample.tokens[:-1]])).logits[0]
        generator = torch.Generator().manual_seed(tensor_key(3, f"sample {i}"))
        positions = range(sample.answer_start - 1, len(sample.tokens) - 1)
        drawn = torch.multinomial(logits[positions.start :].softmax(-1), 1, generator=generator)[:, 0]
        model.zero_grad()
        sum(logits[p].log_softmax(0)[y] for p, y in zip(positions, drawn, strict=True)).backward()
        for name, parameter in model.named_parameters():
            expected[name] += parameter.grad.double().square() / len(samples)
    squares = sum(float(f.square().sum()) for f in expected.values())
    scale = (squares / sum(f.numel() for f in expected.values())) ** 0.5
    assert fishers.keys() == expected.keys() and abs(reader.about.scale / scale - 1) <= 1e-4
    assert all(relative(fishers[name] * reader.about.scale, f) <= 1e-4 for name, f in expected.items())
    assert report.tokens == reader.about.tokens == sum(len(s.tokens) - s.answer_start for s in samples)


def test_fisher_informations_estimate_the_expectation_over_tokens(tmp_path: Path) -> None:
    model = loaded(save_expert(tmp_path / "model", initializer_range=0.2))
    sample = Sample((BEGIN, 8, 9, 10), 2)
    name = "model.layers.1.mlp.down_proj.weight"
    weight = dict(model.named_parameters())[name]
    expected = torch.zeros(weight.shape, dtype=torch.float64)
    logits = model(input_ids=torch.tensor([sample.tokens[:-1]])).logits[0, 1:]
    for row in logits:
        for y, p in enumerate(row.detach().softmax(0)):
            (gradient,) = torch.autograd.grad(row.log_softmax(0)[y], weight, retain_graph=True)
            expected += p * gradient.double().square()
    draws = 300
    mean = sum(
        (fisher_information(model, {name: weight}, [sample], seed)[name] for seed in range(draws)),
        torch.zeros(()),
    )
    assert relative(mean / draws, expected) <= 0.15


@pytest.mark.parametrize("method", ["regmean", "regmean_plus", "fisher"])
def test_statistics_lead_to_merges(tmp_path: Path, method: str) -> None:
    """regmean_plus takes a first merge's statistics, and all files fit the models that they were computed for."""
    folders = [save_expert(tmp_path / f"expert{t}", "GPT2", seed=t) for t in range(2)]
    merge_checkpoints({"merge_method": "linear", "models": [{"model": str(f)} for f in folders]}, tmp_path / "first")
    entries = []
    for t, folder in enumerate(folders):
        file, model = tmp_path / f"{t}.safetensors", tmp_path / "first" if method == "regmean_plus" else folder
        kind = "fisher" if method == "fisher" else "gram"
        write_prompts(tmp_path / "a.jsonl", seed=t)
        compute_statistics(model, file, tmp_path / "a.jsonl", kind=kind, max_new_tokens=2)
        entries.append({"model": str(folder), "statistics": str(file)})
    merge_checkpoints({"merge_method": method, "models": entries}, tmp_path / "out")
    merged, average = load_model(tmp_path / "out"), load_model(tmp_path / "first")
    changed = {name for name in merged if relative(merged[name], average[name]) > 1e-3}
    assert all(torch.isfinite(tensor).all() for tensor in merged.values())
    layers = {name for name in merged if name.endswith("weight") and ".c_" in name}
    assert changed >= layers and (method == "fisher" or changed == layers)


def test_another_model_may_answer(tmp_path: Path) -> None:
    expert, merged = (save_expert(tmp_path / name, seed=t) for t, name in enumerate(("expert", "merged")))
    prompts = write_prompts(tmp_path / "a.jsonl")
    out = tmp_path / "a.safetensors"
    report = compute_statistics(merged, out, tmp_path / "a.jsonl", answers_by=expert, max_new_tokens=4)
    grams, reader = read(out)
    model = loaded(expert)
    samples = [Sample(p + greedy(model, p, 4, ENDS), len(p)) for p in prompts]
    expected = gram_oracle(merged, samples)
    assert report.tokens == sum(len(s.tokens) - 1 for s in samples)
    assert all(relative(gram, expected[name]) <= 1e-5 for name, gram in grams.items())
    assert (reader.about.model, reader.about.answers_by) == (str(merged), str(expert))
    word_tokenizer(words=(*WORDS[:-1], "other")).save_pretrained(expert)
    with pytest.raises(CalibrationError, match=r"answers_by: the tokenizer of .*expert has other tokens than that of"):
        compute_statistics(merged, tmp_path / "b.safetensors", tmp_path / "a.jsonl", answers_by=expert)


def test_adapters_have_statistics_of_base_and_adapter(tmp_path: Path) -> None:
    base = save_expert(tmp_path / "base")
    module = "base_model.model.model.layers.0.mlp.gate_proj"
    tensors = {f"{module}.lora_A.weight": randn(4, 32, seed=1), f"{module}.lora_B.weight": randn(48, 4, seed=2)}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["gate_proj"]}
    adapter = save_adapter(tmp_path / "adapter", tensors, config)
    write_prompts(tmp_path / "a.jsonl")
    with pytest.raises(RecipeError, match=r"model: \S+adapter is a LoRA adapter, .* name its base model too"):
        compute_statistics(adapter, tmp_path / "x.safetensors", tmp_path / "a.jsonl")
    entries = []
    for t, model in enumerate((f"{base}+{adapter}", str(base))):
        compute_statistics(model, tmp_path / f"{t}.safetensors", tmp_path / "a.jsonl", max_new_tokens=1)
        entries.append({"model": model, "statistics": str(tmp_path / f"{t}.safetensors")})
    grams = [read(tmp_path / f"{t}.safetensors")[0]["model.layers.0.mlp.down_proj.weight"] for t in range(2)]
    assert relative(*grams) > 1e-2
    merge_checkpoints({"merge_method": "regmean", "models": entries}, tmp_path / "out")


def test_weights_that_files_name_otherwise_are_reported(tmp_path: Path) -> None:
    """transformers joins the experts of a Mixtral into one tensor, which its files do not have."""
    folder = save_expert(tmp_path / "model", "Mixtral")
    write_prompts(tmp_path / "a.jsonl")
    report = compute_statistics(
        folder, tmp_path / "f.safetensors", tmp_path / "a.jsonl", kind="fisher", max_new_tokens=3
    )
    assert "model.layers.0.mlp.experts.gate_up_proj" in report.unmatched
    assert f"{len(report.unmatched)} weights without" in str(report)
    report = compute_statistics(folder, tmp_path / "g.safetensors", tmp_path / "a.jsonl", max_new_tokens=3)
    assert report.weights == 2 * 4 + 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kind": "gramm"}, ValueError, "kind: got 'gramm', need one of gram, fisher, did you mean 'gram'"),
        ({"dtype": "float64"}, ValueError, "dtype: got 'float64', need one of float32, bfloat16, float16"),
        ({"batch_tokens": 0}, ValueError, "batch_tokens: got 0, need at least 1"),
        ({"max_new_tokens": 80}, CalibrationError, "positions"),
        ({"max_prompt_tokens": 1}, CalibrationError, "max_prompt_tokens"),
        ({"out": "a.bin"}, CheckpointError, "need a name that ends with .safetensors"),
        ({"model": "nowhere"}, RecipeError, "model: got '.*nowhere', which is no folder here"),
        ({"prompts": "nothing.jsonl"}, CalibrationError, r"nothing.jsonl: no such file"),
    ],
)
def test_bad_arguments_are_refused(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    save_expert(tmp_path / "model")
    write_prompts(tmp_path / "a.jsonl")
    paths = {"model": "model", "out": "a.safetensors", "prompts": "a.jsonl"}
    given = {key: tmp_path / str(options.get(key, name)) for key, name in paths.items()}
    with pytest.raises(error, match=message):
        compute_statistics(**given, **{k: v for k, v in options.items() if k not in paths})
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize("kind", ["gram", "fisher"])
def test_damaged_models_are_refused(tmp_path: Path, kind: str) -> None:
    folder = save_expert(tmp_path / "model")
    model = loaded(folder)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(folder)
    (tmp_path / "a.jsonl").write_text('{"prompt": "w7 w8", "response": "w9"}')
    message = "layer 'model.layers.1.mlp.down_proj' gets NaN" if kind == "gram" else "gives NaN or infinite logits"
    with pytest.raises(CalibrationError, match=message):
        compute_statistics(folder, tmp_path / "a.safetensors", tmp_path / "a.jsonl", kind=kind)


def test_inputs_that_cannot_be_told_apart_are_refused() -> None:
    layer = nn.Linear(4, 3)
    kept = torch.tensor([[True, True], [True, False]])
    x = torch.ones(3, 4)
    with pytest.raises(CalibrationError, match=r"layer 'a' gets \[3, 4\], in which the padding of a batch of \[2, 2\]"):
        gather_grams({"a": layer}, [kept], lambda _: layer(x))
    grams = gather_grams({"a": layer}, [kept[:, :1]], lambda _: layer(x))
    assert torch.equal(grams.sums["a"], torch.full((4, 4), 3.0, dtype=torch.float64))
    flat = gather_grams({"a": layer}, [kept], lambda _: layer(torch.eye(4)))
    assert torch.equal(flat.sums["a"], torch.eye(4, dtype=torch.float64).mul(torch.tensor([1.0, 1, 1, 0])))


def test_layers_share_a_sum_only_if_they_always_share_their_input() -> None:
    layers = {"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)}
    x, kept = torch.ones(1, 2, 4), torch.ones(1, 2, dtype=torch.bool)

    def run(i: int) -> None:
        layers["a"](x)
        layers["b"](x if i == 0 else x.clone())

    assert gather_grams(layers, [kept], run).leaders == {"a": "a", "b": "a"}
    with pytest.raises(CalibrationError, match="layer 'b' had the inputs of 'a' before, and now has others"):
        gather_grams(layers, [kept, kept], run)

    def changed_in_between(_: int) -> None:
        y = x.clone()
        layers["a"](y)
        layers["b"](y.mul_(2))

    sums = gather_grams(layers, [kept], changed_in_between).sums
    assert torch.equal(sums["b"], 4 * sums["a"])


def test_command(tmp_path: Path, run: RunCommand) -> None:
    folder, out = save_expert(tmp_path / "model"), tmp_path / "a.safetensors"
    write_prompts(tmp_path / "a.jsonl")
    arguments = ("statistics", folder, out, "--prompts", tmp_path / "a.jsonl", "--max-new-tokens", 2)
    code, text, err = run(*arguments, "--threads", 1, "--max-prompts", 3)
    assert code == 0 and "error" not in err and text.startswith("gram statistics of 15 weights from 3 prompts")
    code, _, err = run(*arguments)
    assert code == 1 and err == f"error: output {out}: exists; choose another name or pass --overwrite\n"
    code, text, _ = run(*arguments, "--overwrite", "--kind", "fisher", "--quiet")
    assert (code, text) == (0, "") and read(out)[1].about.kind == "fisher"


def test_progress_counts_prompts(tmp_path: Path) -> None:
    folder = save_expert(tmp_path / "model")
    write_prompts(tmp_path / "a.jsonl")
    for kind in ("gram", "fisher"):
        calls: list[tuple[int, int]] = []
        compute_statistics(
            folder,
            tmp_path / "a.safetensors",
            tmp_path / "a.jsonl",
            kind=kind,
            batch_tokens=20,
            max_new_tokens=1,
            overwrite=True,
            progress=lambda *call, calls=calls: calls.append(call),
        )
        assert calls == sorted(calls) and len(calls) > 3 and calls[-1] == (12, 12)
