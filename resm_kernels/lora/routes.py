"""Which way each method merges low-rank task vectors: exactly through their factors, or element by element."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, Final

from resm_kernels.methods import Method

_MATRICES: Final = ("tsvm", "resm", "iso_c", "iso_cts", "star", "tsv_compress", "dc_merge", "resmerge")
_SUMS: Final = ("task_arithmetic", "linear", "passthrough")
_ELEMENTS: Final = (
    *("ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties", "sce"),
    *("nearswap", "ram", "ramplus_tl", "wudi"),
)


class Route(Enum):
    """How a method merges task vectors Δ_t = s_t·B_t·A_t of one weight.

    Attributes:
        SUM: Σ c_t·Δ_t with numbers c_t that do not depend on the Δ_t: the factors are put side by side.
        CORES: f(Q·M_t·Pᵀ) = Q·f(M_t)·Pᵀ for orthonormal Q and P, which span all B_t and A_tᵀ: cores M_t are merged.
        ROWS_SHARED: f(Q·X_t) = Q·f(X_t): the X_t = QᵀΔ_t are merged, which have as many rows as all ranks together.
        COLUMNS_SHARED: f(X_t·Pᵀ) = f(X_t)·Pᵀ: the X_t = Δ_t·P are merged.
        ELEMENTS: The result depends on single elements of the Δ_t and is not of low rank.
        WEIGHTS: The result depends on the weights θ₀ + Δ_t themselves and is not of low rank.
    """

    SUM = "sum"
    CORES = "cores"
    ROWS_SHARED = "rows shared"
    COLUMNS_SHARED = "columns shared"
    ELEMENTS = "elements"
    WEIGHTS = "weights"

    @property
    def is_exact(self) -> bool:
        """True if the merged task vector is of low rank, and is computed from factors alone."""
        return self not in (Route.ELEMENTS, Route.WEIGHTS)


def route_of(method: Method, values: Mapping[str, Any]) -> Route:
    """Return how the method merges a matrix with these values of its parameters.

    A method that this library does not define may use the weights in any way.

    Args:
        values: All parameters by keyword, as `Method.resolve` returns them.
    """
    name = method.name
    if name == "svc":
        inner = route_of(values["inner"], values["inner_values"])
        # A calibrated sum has other singular values than the sum.
        return Route.CORES if inner is Route.SUM and values["spectral"] else inner
    if name in _SUMS or values.get("spectral") is False:
        return Route.SUM
    if name == "resm" and (values["outlier_clip"] or values["granularity"] == "row"):
        return Route.ELEMENTS  # it changes elements or rows before the decomposition
    if name in _MATRICES or name == "multislerp" or (name == "swudi" and values["rank_rule"] == "ratio"):
        return Route.CORES
    if name == "knots":
        return Route.ROWS_SHARED if values["inner"] == "ties" else Route.CORES
    if name == "model_stock":
        return Route.COLUMNS_SHARED if values["filter_wise"] else Route.CORES
    if name == "nuslerp":
        if values["nuslerp_flatten"]:
            return Route.CORES
        return Route.ROWS_SHARED if values["nuslerp_row_wise"] else Route.COLUMNS_SHARED
    return Route.ELEMENTS if name in _ELEMENTS or name == "swudi" else Route.WEIGHTS
