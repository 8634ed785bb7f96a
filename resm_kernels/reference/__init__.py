"""Each op's definition in plain torch: the yardstick of the fast kernels, and what runs where none is built.

The functions take the operators' flattened arguments (see `resm_kernels.ops`), compute in float64 where that changes
no stated rounding, and trace with meta and fake tensors.
"""
