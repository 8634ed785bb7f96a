"""Types of parameters that several methods share, so that these mean the same everywhere."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from resm_kernels.linalg import routes
from resm_kernels.methods._signature import Option

Weight = Annotated[list[float], Option("factor of each expert's task vector; 1 leaves it unchanged")]
NonnegativeWeight = Annotated[
    list[float], Option("how much each expert counts; only the ratios of the weights matter", minimum=0.0)
]
Lambda = Annotated[float, Option("scale of the merged task vector before it is added to the base")]

Density = Annotated[
    list[float], Option("share of each task vector that is kept; 1 keeps all elements", minimum=0.0, maximum=1.0)
]
Gamma = Annotated[
    list[float],
    Option("share of each task vector that is dropped as outliers, the largest magnitudes", minimum=0.0, maximum=1.0),
]
Epsilon = Annotated[
    list[float],
    Option("a row's smallest element is kept with density − ε, its largest with density + ε", minimum=0.0, maximum=0.5),
]
Normalize = Annotated[bool, Option("divide by the sum of the weights; after an election, of those that agree in sign")]
NormalizeAgreeing = Annotated[bool, Option("divide by the sum of the weights of the experts that agree in sign")]
Rescale = Annotated[bool, Option("scale the kept elements of each task vector up to the L1 norm of all its elements")]
RescaleBy = Annotated[
    Literal["l1", "probability"],
    Option(
        "how `rescale` works: l1 restores the L1 norm (mergekit), probability divides each element by its probability "
        "of being kept (the papers)"
    ),
]
Int8Mask = Annotated[bool, Option("accepted as mergekit's memory option; masks are single bits here", ignored=True)]
UnusedDensity = Annotated[list[float], Option("accepted as in mergekit; no element is dropped", ignored=True)]
UnusedRescale = Annotated[bool, Option("accepted as in mergekit; no element is dropped", ignored=True)]

SPECTRAL: Final = "false averages the task vectors of this tensor, as those of tensors that are no matrices"
Spectral = Annotated[bool, Option(SPECTRAL)]
DecompositionMethod = Annotated[
    routes.DecompositionMethod,
    Option("auto: the cheapest that is accurate enough; gram, exact: in float64; randomized"),
]
FullDecomposition = Annotated[
    routes.FullDecompositionMethod, Option("gram: products and eigenvectors; exact: LAPACK's SVD")
]
"""For methods that need all singular values."""
ACCURACY: Final = "relative backward error allowed in each expert's subspaces; 0 asks for float64's"
Accuracy = Annotated[float, Option(ACCURACY, minimum=0.0)]
