"""CUDA kernels of csrc/cuda, one module for each op. Nothing here is imported before a tensor on a GPU needs it."""
