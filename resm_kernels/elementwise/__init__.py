"""Building blocks of element-wise methods: input checks, merges in blocks of plain torch, sparsification, angles.

Import from the modules: `inputs` checks a method's inputs and bounds its memory, `blocks` runs plain torch on a part of
a tensor at a time, `sparsify` merges task vectors of which some elements are dropped, and `angles` has cosines between
tensors and interpolation along great circles.
"""
