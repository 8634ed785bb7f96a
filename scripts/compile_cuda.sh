#!/usr/bin/env bash
# Compiles csrc/cuda for every architecture of CMakeLists.txt, prints the registers and shared memory of each kernel, and
# fails if a kernel spills.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v nvcc >/dev/null; then
  echo "skipped: no nvcc on this machine, the CUDA kernels are not compiled"
  exit 0
fi
log=build/cuda/compile.log
rm -rf build/cuda  # a full build: the compiler reports registers only for what it compiles
mkdir -p build/cuda
PATH="$PWD/.venv/bin:$PATH"
.venv/bin/python -m pip install --quiet --disable-pip-version-check 'nanobind>=3.1' cmake ninja
cmake --fresh -G Ninja -S . -B build/cuda -DRESM_CUDA=ON -DRESM_WERROR=ON \
  -DPython_EXECUTABLE="$PWD/.venv/bin/python" -Dnanobind_DIR="$(python -m nanobind --cmake_dir)" >/dev/null
cmake --build build/cuda --verbose >"$log" 2>&1 || { tail -n 40 "$log"; exit 1; }
# A line for each kernel: architecture, registers, shared memory, name with dtypes (codes of csrc/common/dtype.h; -1:
# mixed).
report() {
  c++filt <"$log" | awk '
    /Compiling entry function/ {
      name = $0; sub(/.*run_kernel</, "", name); sub(/>\(.*/, "", name)
      gsub(/resm::cuda::|\(anonymous namespace\)::/, "", name)
      arch = $0; sub(/.*for ./, "", arch); sub(/.$/, "", arch)
    }
    /bytes stack frame/ { stack = $1; spilled = $5 + $9 }
    / Used [0-9]+ registers/ {
      shared = match($0, /[0-9]+ bytes smem/) ? substr($0, RSTART, RLENGTH) + 0 : 0
      printf "%-7s %4d registers %6d bytes shared%s  %s\n", arch, $5, shared, stack + spilled ? "  SPILLS" : "", name
    }'
}
report | sort >build/cuda/kernels.txt
cat build/cuda/kernels.txt
# A stack frame is an array that does not fit, or cannot be kept in, registers: as slow as a spill. Static shared memory
# above 48 KiB, and more registers than kResident blocks of a kernel leave (csrc/cuda/block.h), do not compile.
if grep -q SPILLS build/cuda/kernels.txt; then
  echo "error: a kernel spills registers" >&2
  exit 1
fi
