"""Run by `make wheel-smoke` inside a fresh environment that holds the wheel and its dependencies alone."""

import subprocess
import sys

import torch

import resm_kernels

facts = resm_kernels.backends()
assert facts["native"]["available"], facts["native"]["reason"]
base = torch.zeros(8, 4, dtype=torch.bfloat16)
experts = [torch.full((8, 4), x, dtype=torch.bfloat16) for x in (1.0, 3.0)]
merged = resm_kernels.merge(base, experts, "linear")
assert merged.eq(2).all()
for method in resm_kernels.methods.names():
    assert resm_kernels.merge(base, experts, method).isfinite().all()
assert "transformers" not in sys.modules
said = subprocess.run([sys.executable, "-m", "resm_kernels", "info"], capture_output=True, text=True, check=True)
assert resm_kernels.__version__ in said.stdout
print(f"resm_kernels {resm_kernels.__version__} works from its wheel, kernels: {facts['native']['isa']}")
