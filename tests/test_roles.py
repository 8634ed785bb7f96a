"""The roles of tensors: from transformers' classes and from names, and what spectral methods make of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import fine_tuned, llama_shapes, load_model, save_model
from conftest import RunCommand, UseThreads
from inputs import same_bits
from torch import Tensor

from resm_kernels import merge
from resm_kernels.engine import MergeError, MergeOptions, blocks, checkpoint_stats, merge_checkpoints, plan_merge
from resm_kernels.engine.costs import SPECTRAL, job_work
from resm_kernels.engine.matrices import merge_matrices
from resm_kernels.roles import Role, is_plain, role_by_name, stacked_role

WIDTH, INNER = 32, 24
EXPERTS = "model.layers.0.mlp.experts."
MIXER = "model.layers.0.mixer."
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (64, WIDTH),
    "model.embed_positions.weight": (40, WIDTH),
    "model.layers.0.self_attn.q_proj.weight": (WIDTH, WIDTH),
    "model.layers.0.self_attn.relative_position_bias_table": (49, 4),
    f"{EXPERTS}gate_up_proj": (6, WIDTH, 2 * INNER),
    f"{EXPERTS}gate_up_proj_bias": (6, 2 * INNER),
    f"{EXPERTS}down_proj": (6, INNER, WIDTH),
    f"{MIXER}A_log": (48, 16),
    f"{MIXER}D": (48,),
    f"{MIXER}conv1d.weight": (48, 1, 8),
    "model.vision.patch_embed.proj.weight": (WIDTH, 3, 4, 4),
    "model.norm.weight": (WIDTH,),
}
MATRICES = {  # (matrices, rows, columns), and whether they are stored as (in, out)
    "model.layers.0.self_attn.q_proj.weight": ((1, WIDTH, WIDTH), False),
    f"{EXPERTS}gate_up_proj": ((6, WIDTH, 2 * INNER), True),
    f"{EXPERTS}down_proj": ((6, INNER, WIDTH), True),
    "model.vision.patch_embed.proj.weight": ((1, WIDTH, 48), False),
}
CONFIG = {"architectures": ["OfNobodyForCausalLM"], "model_type": "of_nobody", "hidden_size": WIDTH}


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """A base and three experts of no class of transformers."""
    generator = torch.Generator().manual_seed(0)
    base = {name: (torch.randn(shape, generator=generator) * 0.05).bfloat16() for name, shape in SHAPES.items()}
    models = [base, *(fine_tuned(base, seed) for seed in (1, 2, 3))]
    return [save_model(tmp_path / str(i), weights, CONFIG) for i, weights in enumerate(models)]


def recipe(folders: list[Path], method: str, **keys: Any) -> dict[str, Any]:
    base, *experts = map(str, folders)
    return {"merge_method": method, "base_model": base, "models": [{"model": expert} for expert in experts]} | keys


def merged_by_hand(folders: list[Path], method: str, **parameters: Any) -> dict[str, Tensor]:
    """Each matrix merged alone, as (out, in), and all else averaged."""
    base, *experts = map(load_model, folders)
    result = {}
    for name, tensor in base.items():
        others = [expert[name] for expert in experts]
        if name not in MATRICES:
            spectral = name == "model.embed_tokens.weight" and method != "resm"
            result[name] = merge(tensor, others, method, **parameters, spectral=spectral)
            continue
        shape, transposed = MATRICES[name]
        stacks = [x.reshape(shape).mT if transposed else x.reshape(shape) for x in (tensor, *others)]
        alone = [
            merge(own.contiguous(), [x.contiguous() for x in rest], method, **parameters, spectral=True)
            for own, *rest in zip(*stacks, strict=True)
        ]
        stack = torch.stack(alone)
        result[name] = (stack.mT if transposed else stack).reshape(tensor.shape)
    return result


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("resm", {}), ("resm", {"granularity": "row", "beta": 1.0}), ("tsvm", {}), ("knots", {}), ("wudi", {"steps": 3})],
)
def test_each_matrix_is_merged_alone(
    folders: list[Path], tmp_path: Path, method: str, parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the threads, and however many matrices fit into memory."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 1 << 12)
    expected = merged_by_hand(folders, method, **parameters)
    for i, options in enumerate(({"threads": 1}, {"threads": 3}, {"threads": 2, "memory_limit": "200KiB"})):
        out = tmp_path / f"out{i}"
        merge_checkpoints(recipe(folders, method, parameters=parameters), out, **options)
        result = load_model(out)
        assert [name for name in expected if not same_bits(result[name], expected[name])] == []


def test_other_spectral_methods_take_every_matrix(folders: list[Path], tmp_path: Path) -> None:
    for method in ("iso_c", "star", "svc"):
        out = tmp_path / method
        merge_checkpoints(recipe(folders, method), out)
        base, *experts = map(load_model, folders)
        result = load_model(out)
        name = f"{EXPERTS}down_proj"
        for i in range(6):
            alone = merge(base[name][i].mT.contiguous(), [e[name][i].mT.contiguous() for e in experts], method)
            assert same_bits(result[name][i], alone.mT.contiguous())
        averaged = merge(base[f"{MIXER}A_log"], [e[f"{MIXER}A_log"] for e in experts], method, spectral=False)
        assert same_bits(result[f"{MIXER}A_log"], averaged)


def test_recipes_decide_about_tables_but_not_about_what_is_no_linear_map(folders: list[Path]) -> None:
    def spectral(**parameters: Any) -> dict[str, Any]:
        with plan_merge(recipe(folders, "tsvm", parameters=parameters)) as plan:
            return {job.name: job.parameters["spectral"] for job in plan.jobs}

    default = spectral()
    assert default["model.embed_tokens.weight"] and default[f"{EXPERTS}down_proj"]
    table, state = "model.embed_positions.weight", f"{MIXER}A_log"
    assert not default[table] and not default[state]
    stated = spectral(spectral=True)
    assert stated[table] and not stated[state] and not stated[f"{EXPERTS}gate_up_proj_bias"]
    assert not any(spectral(spectral=False).values())


def test_large_stacks_are_merged_in_groups_of_matrices(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 1 << 12)
    with plan_merge(recipe(folders, "tsvm"), options=MergeOptions(memory_limit="200KiB", threads=2)) as plan:
        groups = [job for job in plan.pieces if job.name == f"{EXPERTS}gate_up_proj"]
        sizes = {job.inputs[0][1].numel for job in groups}
    assert len(groups) > 1 and all(size % (WIDTH * 2 * INNER) == 0 for size in sizes)


def test_groups_of_any_size_give_the_same_bits(use_threads: UseThreads) -> None:
    """A transposed stack, merged as a whole and from its third matrix on."""
    generator = torch.Generator().manual_seed(3)
    base, *experts = (torch.randn(5, 24, 32, generator=generator).bfloat16() for _ in range(4))
    role = stacked_role(Role.FUSED_EXPERTS, "experts", base.shape, transposed=True)
    numbers: list[int] = []

    def alone(number: int, own: Tensor, others: list[Tensor]) -> Tensor:
        numbers.append(number)
        return merge(own, others, "tsvm")

    whole = merge_matrices(role, alone, base, experts, torch.float32)
    for i in range(5):
        turned = [tensor[i].mT.contiguous() for tensor in (base, *experts)]
        assert torch.equal(whole[i], merge(turned[0], turned[1:], "tsvm").float().mT)
    for threads, together in ((1, 1), (1, 3), (2, 2), (3, 2), (4, 4)):
        use_threads(threads)
        numbers.clear()
        part = [tensor[2:] for tensor in (base, *experts)]
        result = merge_matrices(role, alone, part[0], part[1:], torch.float32, together=together, first=2)
        assert torch.equal(result, whole[2:]) and sorted(numbers) == [2, 3, 4]


def test_a_damaged_expert_is_named_with_all_its_values(folders: list[Path], tmp_path: Path) -> None:
    weights = load_model(folders[2])
    weights[f"{EXPERTS}down_proj"][1:4, 0, :5] = torch.nan
    save_model(folders[2], weights, CONFIG)
    with pytest.raises(MergeError, match=rf"{folders[2]}: tensor '{EXPERTS}down_proj' holds 15 NaN"):
        merge_checkpoints(recipe(folders, "tsvm"), tmp_path / "out")


def test_statistics_are_of_each_matrix(folders: list[Path], run: RunCommand, tmp_path: Path) -> None:
    rows = checkpoint_stats(recipe(folders, "resm"), spectra=True)
    of_experts = [row for row in rows if row.name == f"{EXPERTS}down_proj"]
    assert [row.slice for row in of_experts] == list(range(6))
    assert all(row.role == "fused_experts" and row.shape == (WIDTH, INNER) for row in of_experts)
    assert all(row.spectral and row.spectra is not None for row in of_experts)
    base, expert = load_model(folders[0])[of_experts[0].name], load_model(folders[1])[of_experts[0].name]
    changes = (expert.double() - base.double())[4]
    assert of_experts[4].sparsity[0] == pytest.approx(float((changes == 0).double().mean()))
    assert of_experts[4].spectra.frobenius[0] == pytest.approx(float(changes.norm()))
    roles = {row.name: row.role for row in rows}
    assert roles[f"{MIXER}A_log"] == "state" and roles["model.embed_positions.weight"] == "position_table"
    patches = next(row for row in rows if row.name == "model.vision.patch_embed.proj.weight")
    assert (patches.role, patches.shape, patches.slice) == ("convolution", (WIDTH, 48), None)
    file = tmp_path / "recipe.yml"
    file.write_text(json.dumps(recipe(folders, "resm")))
    code, out, _ = run("stats", file)
    assert code == 0 and "fused_experts" in out and f"6×({WIDTH}×{INNER})" in out
    code, out, _ = run("stats", file, "--json", "-", "--quiet")
    assert len([row for row in json.loads(out)["tensors"] if row["slice"] is not None]) == 2 * 6


def test_the_plan_counts_roles(folders: list[Path]) -> None:
    with plan_merge(recipe(folders, "resm")) as plan:
        lines = [line for line in plan.describe().splitlines() if line.startswith("roles")]
        costs = {job.name: job_work(plan.method, job).flops for job in plan.jobs}
    assert len(lines) == 1 and "2 fused_experts" in lines[0] and "from names" in lines[0]
    assert "14 matrices are decomposed" in lines[0]
    a, b = SPECTRAL["resm"]
    assert costs[f"{EXPERTS}down_proj"] == 6 * 3 * (a * INNER * WIDTH * INNER + b * INNER**3)
    assert costs[f"{MIXER}A_log"] == costs[f"{EXPERTS}gate_up_proj_bias"] == 0
    with plan_merge(recipe(folders, "ties")) as plan:
        assert plan.roles_from == ""
        assert not any(line.startswith("roles") for line in plan.describe().splitlines())


@pytest.mark.parametrize(
    ("name", "shape", "role", "matrices", "transposed"),
    [
        ("h.0.attn.c_attn.weight", (64, 192), Role.LINEAR, (1, 64, 192), False),
        ("model.layers.0.block_sparse_moe.input_linear.weight", (4, 96, 64), Role.FUSED_EXPERTS, (4, 96, 64), False),
        ("layers.1.feed_forward.experts.gate_up_proj", (4, 64, 96), Role.FUSED_EXPERTS, (4, 64, 96), True),
        ("layers.1.feed_forward.experts.down_proj", (4, 64, 48), Role.FUSED_EXPERTS, (4, 64, 48), False),
        ("transformer.blocks.0.ffn.experts.mlp.v1", (384, 64), Role.FUSED_EXPERTS, (4, 96, 64), False),
        ("transformer.blocks.0.ffn.experts.mlp.w2", (384, 64), Role.FUSED_EXPERTS, (4, 96, 64), True),
        ("backbone.layers.0.mixer.conv1d.weight", (128, 1, 4), Role.CONVOLUTION, (128, 1, 4), False),
        ("down_blocks.0.resnets.0.conv1.weight", (64, 32, 3, 3), Role.CONVOLUTION, (1, 64, 288), False),
        ("encoder.pos_conv_embed.conv.weight_g", (1, 1, 16), Role.NORM, None, False),
        ("encoder.pos_conv_embed.conv.weight_v", (64, 4, 16), Role.CONVOLUTION, (1, 64, 64), False),
        ("SelfAttention.relative_attention_bias.weight", (32, 4), Role.BIAS_TABLE, None, False),
        ("transformer.wpe.weight", (64, 32), Role.POSITION_TABLE, None, False),
        ("vit.embeddings.position_embeddings", (1, 197, 64), Role.POSITION_TABLE, None, False),
        ("encoder.layers.0.attn.rel_pos_h", (27, 64), Role.POSITION_TABLE, None, False),
        ("text_model.embeddings.token_embedding.weight", (96, 32), Role.EMBEDDING, None, False),
        ("vision_model.embeddings.patch_embedding.weight", (64, 48), Role.LINEAR, (1, 64, 48), False),
        ("model.embed_tokens_per_layer.weight", (96, 32), Role.EMBEDDING, None, False),
        ("model.decoder.embed_tokens.3.weight", (96, 32), Role.EMBEDDING, None, False),
        ("lm_heads.0.weight", (96, 32), Role.OUTPUT_HEAD, None, False),
        ("cls.predictions.decoder.weight", (96, 32), Role.OUTPUT_HEAD, None, False),
        ("lm_head.dense.weight", (32, 32), Role.LINEAR, (1, 32, 32), False),
        ("transformer.resblocks.0.attn.in_proj_weight", (96, 32), Role.LINEAR, (1, 96, 32), False),
        ("lstm.weight_hh_l0_reverse", (96, 24), Role.LINEAR, (1, 96, 24), False),
        ("conditioner.embedders.1.model.text_projection", (32, 24), Role.LINEAR, (1, 32, 24), True),
        ("rwkv.blocks.0.attention.time_decay", (64,), Role.STATE, None, False),
        ("transformer.layer.0.rel_attn.r_w_bias", (4, 16), Role.BIAS, None, False),
        ("transformer.layer.0.rel_attn.q", (64, 4, 16), Role.OTHER, None, False),
        ("vit.embeddings.cls_token", (1, 1, 64), Role.OTHER, None, False),
        ("model.layers.0.input_layernorm.weight", (64,), Role.NORM, None, False),
    ],
)
def test_roles_by_name(
    name: str, shape: tuple[int, ...], role: Role, matrices: tuple[int, ...] | None, transposed: bool
) -> None:
    config = {"text_config": {"hidden_size": 64}, "ffn_config": {"moe_num_experts": 4}}
    found = role_by_name(name, shape, config)
    assert found.role is role and found.transposed == transposed
    assert matrices is None or found.matrices == matrices
    assert found.slices * found.rows * found.columns == torch.Size(shape).numel()


def test_square_experts_are_told_apart_by_the_kind_of_model() -> None:
    for kind, transposed in (("gpt_oss", True), ("qwen3_moe", False)):
        config = {"model_type": kind, "hidden_size": 64}
        assert role_by_name(f"{EXPERTS}down_proj", (4, 64, 64), config).transposed == transposed
    assert role_by_name("h.0.attn.c_attn.weight", (64, 192), {"model_type": "gpt2"}).transposed


def test_names_of_a_llama_leave_no_doubt() -> None:
    assert all(is_plain(name, shape) for name, shape in llama_shapes().items())
    assert not is_plain("transformer.h.0.attn.c_attn.weight", (64, 192))
    assert not is_plain(f"{EXPERTS}down_proj", (4, 64, 64))


def classes(transformers: Any) -> Mapping[str, tuple[Any, Mapping[str, tuple[Any, ...]]]]:
    """Tiny models, and for some of their tensors role, number, rows and columns of the matrices, and orientation."""
    t = transformers
    text = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    image = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    image |= {"image_size": 16, "patch_size": 8}
    return {
        "gpt-oss": (
            t.GptOssForCausalLM(t.GptOssConfig(**text, **heads, head_dim=16, num_local_experts=4)),
            {
                "model.layers.0.mlp.experts.gate_up_proj": (Role.FUSED_EXPERTS, 4, 64, 96, True),
                "model.layers.0.mlp.experts.down_proj_bias": (Role.BIAS, 1, 4, 64, False),
                "model.layers.0.mlp.router.weight": (Role.LINEAR, 1, 4, 64, False),
                "lm_head.weight": (Role.OUTPUT_HEAD, 1, 96, 64, False),
            },
        ),
        "Llama 4": (
            t.Llama4ForCausalLM(
                t.Llama4TextConfig(**text, **heads, head_dim=16, num_local_experts=4, intermediate_size_mlp=48)
            ),
            {"model.layers.1.feed_forward.experts.down_proj": (Role.FUSED_EXPERTS, 4, 48, 64, True)},
        ),
        "GraniteMoE": (
            t.GraniteMoeForCausalLM(t.GraniteMoeConfig(**text, **heads, num_local_experts=4)),
            {
                "model.layers.0.block_sparse_moe.input_linear.weight": (Role.FUSED_EXPERTS, 4, 96, 64, False),
                "model.layers.0.block_sparse_moe.output_linear.weight": (Role.FUSED_EXPERTS, 4, 64, 48, False),
            },
        ),
        "Mixtral": (
            t.MixtralForCausalLM(t.MixtralConfig(**text, **heads, num_local_experts=4)),
            {"model.layers.0.block_sparse_moe.experts.3.w1.weight": (Role.LINEAR, 1, 48, 64, False)},
        ),
        "DBRX": (
            t.DbrxForCausalLM(
                t.DbrxConfig(
                    vocab_size=96,
                    d_model=64,
                    n_heads=4,
                    n_layers=1,
                    attn_config={"kv_n_heads": 2, "rope_theta": 1e4},
                    ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "hidden_size": 64},
                )
            ),
            {
                "transformer.blocks.0.ffn.experts.mlp.w1": (Role.FUSED_EXPERTS, 4, 48, 64, False),
                "transformer.blocks.0.ffn.experts.mlp.w2": (Role.FUSED_EXPERTS, 4, 48, 64, True),
            },
        ),
        "Mamba": (
            t.MambaForCausalLM(t.MambaConfig(vocab_size=96, hidden_size=64, num_hidden_layers=1, state_size=8)),
            {
                "backbone.layers.0.mixer.A_log": (Role.STATE, 1, 128, 8, False),
                "backbone.layers.0.mixer.conv1d.weight": (Role.CONVOLUTION, 128, 1, 4, False),
                "backbone.layers.0.mixer.in_proj.weight": (Role.LINEAR, 1, 256, 64, False),
                "backbone.embeddings.weight": (Role.EMBEDDING, 1, 96, 64, False),
            },
        ),
        "GPT-2": (
            t.GPT2LMHeadModel(t.GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=4, n_positions=32)),
            {
                "h.0.attn.c_attn.weight": (Role.LINEAR, 1, 64, 192, True),  # as on the hub, without a prefix
                "transformer.wpe.weight": (Role.POSITION_TABLE, 1, 32, 64, False),
            },
        ),
        "CLIP": (
            t.CLIPModel(t.CLIPConfig(text_config={**image, "vocab_size": 96}, vision_config=image, projection_dim=32)),
            {
                "vision_model.embeddings.patch_embedding.weight": (Role.CONVOLUTION, 1, 32, 192, False),
                "vision_model.embeddings.position_embedding.weight": (Role.POSITION_TABLE, 1, 5, 32, False),
                "text_model.embeddings.token_embedding.weight": (Role.EMBEDDING, 1, 96, 32, False),
                "visual_projection.weight": (Role.LINEAR, 1, 32, 32, False),
            },
        ),
        "T5": (
            t.T5ForConditionalGeneration(
                t.T5Config(vocab_size=96, d_model=64, d_kv=16, d_ff=48, num_layers=1, num_heads=4)
            ),
            {
                "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (
                    *(Role.BIAS_TABLE, 1, 32, 4),
                    False,
                )
            },
        ),
        "Swin": (
            t.SwinForImageClassification(
                t.SwinConfig(image_size=16, patch_size=4, embed_dim=16, depths=[1], num_heads=[2], window_size=2)
            ),
            {
                "swin.encoder.layers.0.blocks.0.attention.self.relative_position_bias_table": (
                    *(Role.BIAS_TABLE, 1, 9, 2),
                    False,
                )
            },
        ),
        "Wav2Vec2": (
            t.Wav2Vec2ForCTC(
                t.Wav2Vec2Config(
                    **(text | {"num_hidden_layers": 1}),
                    num_attention_heads=4,
                    conv_dim=(32, 32),
                    conv_kernel=(10, 3),
                    conv_stride=(5, 2),
                    num_conv_pos_embeddings=16,
                    num_conv_pos_embedding_groups=4,
                )
            ),
            {
                "wav2vec2.feature_extractor.conv_layers.1.conv.weight": (Role.CONVOLUTION, 1, 32, 96, False),
                "wav2vec2.encoder.pos_conv_embed.conv.weight_g": (Role.NORM, 1, 1, 16, False),
                "wav2vec2.encoder.pos_conv_embed.conv.weight_v": (Role.CONVOLUTION, 4, 16, 256, False),
            },
        ),
        "XLNet": (
            t.XLNetLMHeadModel(t.XLNetConfig(vocab_size=96, d_model=64, n_layer=1, n_head=4, d_inner=96)),
            {
                "transformer.layer.0.rel_attn.q": (Role.LINEAR, 1, 64, 64, True),
                "transformer.layer.0.rel_attn.o": (Role.LINEAR, 1, 64, 64, False),
                "transformer.layer.0.rel_attn.r_w_bias": (Role.BIAS, 1, 4, 16, False),
                "transformer.word_embedding.weight": (Role.EMBEDDING, 1, 96, 64, False),
            },
        ),
    }


def test_roles_from_classes() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")
    from resm_kernels.engine.architecture import Architecture
    from resm_kernels.engine.roles import RolesInMemory

    with torch.device("meta"):
        models = classes(transformers)
    for kind, (model, expected) in models.items():
        shapes = _stored_shapes(model, expected)
        found = RolesInMemory(Architecture(model)).of({name: (name, shape) for name, shape in shapes.items()})
        for name, facts in expected.items():
            role = found[name]
            assert (role.role, *role.matrices, role.transposed) == facts, (kind, name)
            assert role.module in dict(model.named_modules())


def _stored_shapes(model: Any, expected: Mapping[str, tuple[Any, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors in files: as in memory, or as the expected matrices say for what is joined or renamed."""
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = {}
    for name, (_, slices, rows, columns, _) in expected.items():
        renamed = {"weight_g": (1, 1, 16), "weight_v": (64, 16, 16)}.get(name.rpartition(".")[2])
        own = (slices, rows, columns) if slices > 1 else (rows, columns)
        shapes[name] = state.get(name) or renamed or own
    return shapes


def test_experts_that_transformers_turns_are_known_by_their_shape() -> None:
    """Files of Qwen3-VL-MoE hold (experts, in, out), the loaded model (experts, out, in)."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")
    from resm_kernels.engine.architecture import Architecture
    from resm_kernels.engine.roles import RolesInMemory

    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 16}
    text = {**sizes, "num_key_value_heads": 2, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
    config = transformers.Qwen3VLMoeTextConfig(**text)
    with torch.device("meta"):
        model = transformers.Qwen3VLMoeTextModel(config)
    name = "layers.0.mlp.experts.gate_up_proj"
    for shape, transposed in (((4, 48, 64), False), ((4, 64, 48), True)):
        role = RolesInMemory(Architecture(model)).of({name: (name, shape)})[name]
        assert (role.matrices, role.transposed) == (shape, transposed)
