"""Types of parameters that several methods share, so that these mean the same everywhere."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from resm_kernels.methods._signature import Option

Weight = Annotated[list[float], Option("factor of each expert's task vector; 1 keeps it as it is")]
Lambda = Annotated[float, Option("scale of the merged task vector before it is added to the base")]

Density = Annotated[list[float], Option("share of each task vector kept; 1 keeps all", minimum=0.0, maximum=1.0)]
Gamma = Annotated[
    list[float],
    Option("share of each task vector left out as outliers, largest magnitudes first", minimum=0.0, maximum=1.0),
]
Epsilon = Annotated[
    list[float],
    Option(
        "how far a row's smallest and largest elements' probabilities of being kept lie from density",
        minimum=0.0,
        maximum=0.5,
    ),
]
Normalize = Annotated[bool, Option("divide by the sum of the weights (of those that agree in sign)")]
NormalizeAgreeing = Annotated[bool, Option("divide by the sum of the weights whose sign agrees")]
Rescale = Annotated[bool, Option("scale what is kept of each task vector up to the L1 norm of all of it")]
RescaleBy = Annotated[
    Literal["l1", "probability"],
    Option(
        "what `rescale` means: l1 restores the L1 norm (mergekit), probability divides by that of being kept "
        "(the papers)"
    ),
]
Int8Mask = Annotated[bool, Option("accepted as mergekit's memory option; masks are single bits here", ignored=True)]
UnusedDensity = Annotated[list[float], Option("accepted as mergekit does, which leaves nothing out here", ignored=True)]
UnusedRescale = Annotated[bool, Option("accepted as mergekit does, which leaves nothing out", ignored=True)]

SPECTRAL: Final = "false averages the task vectors of this tensor instead, as for vectors"
Spectral = Annotated[bool, Option(SPECTRAL)]
DecompositionMethod = Annotated[
    Literal["auto", "gram", "exact", "randomized"],
    Option("auto: the cheapest that is accurate enough; gram, exact: in float64; randomized"),
]
FullDecomposition = Annotated[Literal["gram", "exact"], Option("gram: products and eigenvectors; exact: LAPACK's SVD")]
"""For methods that need all singular values."""
ACCURACY: Final = "relative backward error allowed in each expert's subspaces; 0 for float64's"
Accuracy = Annotated[float, Option(ACCURACY, minimum=0.0)]
