"""What element-wise methods share: input checks, merges in blocks of plain torch, sparsification, angles.

Import from the modules: `inputs` checks what a method got and bounds its memory, `blocks` runs plain torch on a part of
a tensor at a time, `sparsify` merges task vectors of which elements are left out, and `angles` has cosines between
tensors and interpolation along great circles.
"""
