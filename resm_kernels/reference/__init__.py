"""Each op's definition in plain torch. Fast kernels are tested against it, and it runs where there is none.

A module `reference/<op>.py` holds the op's options record, if it has options, and its definition, a function
`<op>(*inputs, options)`. The op's declaration in `resm_kernels.ops` follows from that function's annotations.
Definitions compute in float64 where that changes no stated rounding, and they trace with meta and fake tensors.
"""
