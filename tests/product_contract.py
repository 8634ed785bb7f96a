"""What products of a task vector with another matrix have in common; the tests of these ops take it over."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, ClassVar

import pytest
import torch
from conftest import ISAS, EveryWay
from hypothesis import given
from hypothesis import strategies as st
from inputs import KINDS, LAYOUTS, dtype_pairs, generator, group, laid_out, randn, same_bits
from torch import Tensor
from torch.utils._pytree import tree_leaves

EMPTY = [(0, 5, 3), (5, 0, 3), (5, 3, 0), (0, 0, 0)]


def same(a: Any, b: Any) -> bool:
    """Whether two results have the same bits: tensors, sequences of them, or records whose fields they are."""

    def equal(x: Tensor, y: Tensor) -> bool:
        return same_bits(x, y) if x.is_floating_point() else x.dtype == y.dtype and torch.equal(x, y)

    a, b = (tree_leaves(vars(result) if is_dataclass(result) else result) for result in (a, b))
    return all(equal(x, y) for x, y in zip(a, b, strict=True))


def on_baseline(every_way: EveryWay, call: Callable[[], Any]) -> Any:
    """The result without fused instructions; all sets that have them, and all thread counts, must give the same."""
    results = {way: call() for way in every_way()}
    for way, result in results.items():
        alike = "baseline, 1 threads" if way.startswith("baseline") else f"{ISAS[0]}, 1 threads"
        assert same(result, results[alike]), way
    return results["baseline, 1 threads"]


class ProductContract(ABC):
    """Tests of an op on a base, an expert of shape (m, n) and an operand.

    Attributes:
        op: The op's public function.
        reference: Its definition.
        operand: The operand's name in errors.
        side: The dimension of Δ that the operand's rows are: 0 for m, 1 for n.
    """

    op: ClassVar[Callable[..., Any]]
    reference: ClassVar[Callable[..., Any]]
    operand: ClassVar[str]
    side: ClassVar[int]

    @abstractmethod
    def check(self, result: Any, base: Tensor | None, expert: Tensor, operand: Tensor) -> None:
        """Fail unless the result is within the bound that the op states."""

    def operand_of(self, m: int, n: int, columns: int) -> Tensor:
        return randn((m, n)[self.side], columns, seed=1)

    def check_call(self, base: Tensor | None, expert: Tensor, operand: Tensor) -> None:
        self.check(type(self).op(base, expert, operand), base, expert, operand)

    @pytest.mark.parametrize("size", EMPTY, ids=str)
    def test_nothing_is_within_the_bound(self, size: tuple[int, int, int]) -> None:
        self.check_size(*size)

    def check_size(self, m: int, n: int, columns: int) -> None:
        base, (expert,) = group((m, n), 1, base_dtype=torch.bfloat16)
        operand = self.operand_of(m, n, columns)
        self.check_call(base, expert, operand)
        self.check_call(None, expert, operand)

    @pytest.mark.parametrize("base_dtype, expert_dtype", dtype_pairs(), ids=str)
    def test_every_pair_of_dtypes_is_within_the_bound(self, base_dtype: torch.dtype, expert_dtype: torch.dtype) -> None:
        base, (expert,) = group((270, 151), 1, base_dtype=base_dtype, expert_dtypes=[expert_dtype])
        operand = self.operand_of(270, 151, 30)
        self.check_call(base, expert, operand)
        self.check_call(None, expert, operand)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_every_kind_of_values_is_within_the_bound(self, kind: str, dtype: torch.dtype) -> None:
        base, (expert,) = group((300, 130), 1, kind, base_dtype=dtype)
        # Small enough that products of the order of the values' squares stay within fp32.
        self.check_call(base, expert, self.operand_of(300, 130, 20) * (1e-30 if kind == "huge" else 1.0))

    def test_sums_that_round_nothing_are_exact(self) -> None:
        @given(m=st.integers(0, 600), n=st.integers(0, 210), columns=st.integers(0, 60), seed=st.integers(0, 99))
        def is_exact(m: int, n: int, columns: int, seed: int) -> None:
            base, (expert,) = group((m, n), 1, "ties", base_dtype=torch.bfloat16, seed=seed)
            operand = torch.randint(-3, 4, ((m, n)[self.side], columns), generator=generator(seed)).float()
            result, expected = type(self).op(base, expert, operand), type(self).reference(base, expert, operand)
            assert all(torch.equal(x, y) for x, y in zip(tree_leaves(result), tree_leaves(expected), strict=True))

        is_exact()

    @pytest.mark.parametrize("m, n, columns", [(700, 250, 60), (1000, 50, 9), (100, 400, 341), (300, 3, 4096)], ids=str)
    def test_bits_depend_on_no_thread_count_and_on_no_fused_instruction_set(
        self, every_way: EveryWay, m: int, n: int, columns: int
    ) -> None:
        base, (expert,) = group((m, n), 1, base_dtype=torch.bfloat16)
        operand = self.operand_of(m, n, columns)
        self.check(on_baseline(every_way, lambda: type(self).op(base, expert, operand)), base, expert, operand)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts_give_what_contiguous_copies_give(self, layout: str) -> None:
        base, expert, _ = laid_out(layout)
        operand = randn(9, expert.shape[self.side], seed=1).mT
        copies = (t.contiguous() for t in (base, expert, operand))
        assert same(type(self).op(base, expert, operand), type(self).op(*copies))

    def test_wrong_arguments_are_refused_by_name(self) -> None:
        base, (expert,) = group((4, 3), 1)
        operand = self.operand_of(4, 3, 2)
        rows, name, shape = operand.shape[0], self.operand, (r"\(m, l\) with m", r"\(n, c\) with n")[self.side]
        refused: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
            (ValueError, rf"{name}: got shape \[2, {rows}\], need {shape} = {rows}", (base, expert, operand.mT)),
            (ValueError, rf"{name}: got shape \[{rows}\]", (base, expert, operand[:, 0])),
            (TypeError, rf"{name}: got a torch.strided tensor of torch.float64", (base, expert, operand.double())),
            (TypeError, rf"{name}: got list, need a tensor", (base, expert, operand.tolist())),
            (ValueError, rf"{name}: requires grad", (base, expert, operand.clone().requires_grad_())),
            (ValueError, r"expert: got shape \[3, 4\], need \[4, 3\] like base", (base, expert.mT, operand)),
            (ValueError, r"expert: got shape \[4, 3, 1\], need a matrix", (None, expert[..., None], operand)),
        ]
        for kind, message, arguments in refused:
            with pytest.raises(kind, match="^" + message):
                type(self).op(*arguments)
