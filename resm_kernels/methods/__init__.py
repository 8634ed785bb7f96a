"""Merge methods: tensors in, merged tensor out. One module a method; `get(name)` finds it."""

from __future__ import annotations

from typing import Final

from resm_kernels.methods._registry import REQUIRED, Method, Parameter
from resm_kernels.methods.arcee_fusion import ARCEE_FUSION
from resm_kernels.methods.breadcrumbs import BREADCRUMBS
from resm_kernels.methods.breadcrumbs_ties import BREADCRUMBS_TIES
from resm_kernels.methods.dare_linear import DARE_LINEAR
from resm_kernels.methods.dare_ties import DARE_TIES
from resm_kernels.methods.dc_merge import DC_MERGE
from resm_kernels.methods.della import DELLA
from resm_kernels.methods.della_linear import DELLA_LINEAR
from resm_kernels.methods.iso_c import ISO_C
from resm_kernels.methods.iso_cts import ISO_CTS
from resm_kernels.methods.karcher import KARCHER
from resm_kernels.methods.knots import KNOTS
from resm_kernels.methods.linear import LINEAR
from resm_kernels.methods.model_stock import MODEL_STOCK
from resm_kernels.methods.multislerp import MULTISLERP
from resm_kernels.methods.nearswap import NEARSWAP
from resm_kernels.methods.nuslerp import NUSLERP
from resm_kernels.methods.passthrough import PASSTHROUGH
from resm_kernels.methods.ram import RAM
from resm_kernels.methods.ramplus_tl import RAMPLUS_TL
from resm_kernels.methods.resm import RESM
from resm_kernels.methods.resmerge import RESMERGE
from resm_kernels.methods.sce import SCE
from resm_kernels.methods.slerp import SLERP
from resm_kernels.methods.star import STAR
from resm_kernels.methods.svc import post_processor
from resm_kernels.methods.swudi import SWUDI
from resm_kernels.methods.task_arithmetic import TASK_ARITHMETIC
from resm_kernels.methods.ties import TIES
from resm_kernels.methods.tsv_compress import TSV_COMPRESS
from resm_kernels.methods.tsvm import TSVM
from resm_kernels.methods.wudi import WUDI
from resm_kernels.suggestions import did_you_mean

_METHODS: Final = {
    m.name: m
    for m in (
        RESM,
        TSVM,
        TASK_ARITHMETIC,
        LINEAR,
        TIES,
        DARE_LINEAR,
        DARE_TIES,
        DELLA,
        DELLA_LINEAR,
        BREADCRUMBS,
        BREADCRUMBS_TIES,
        SCE,
        WUDI,
        SWUDI,
        DC_MERGE,
        RESMERGE,
        TSV_COMPRESS,
        ISO_C,
        ISO_CTS,
        STAR,
        KNOTS,
        SLERP,
        NUSLERP,
        MULTISLERP,
        KARCHER,
        MODEL_STOCK,
        NEARSWAP,
        RAM,
        RAMPLUS_TL,
        ARCEE_FUSION,
        PASSTHROUGH,
    )
}
# What merges task vectors of any number of experts can be calibrated.
_METHODS["svc"] = post_processor(tuple(m for m in _METHODS.values() if m.max_experts is None))


def get(name: str) -> Method:
    """Return the method that recipes call `name`, or raise a ValueError that names the nearest one."""
    try:
        return _METHODS[name]
    except KeyError:
        known = names()
        raise ValueError(
            f"unknown merge method {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}"
        ) from None


def names() -> tuple[str, ...]:
    """Names of all merge methods, in alphabetical order."""
    return tuple(sorted(_METHODS))


__all__ = ["REQUIRED", "Method", "Parameter", "get", "names"]
