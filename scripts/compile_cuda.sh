#!/usr/bin/env bash
# Compiles csrc/cuda for every architecture of CMakeLists.txt, and fails if a kernel spills registers.
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
.venv/bin/python -m pip install --quiet --disable-pip-version-check pybind11 cmake ninja
cmake --fresh -G Ninja -S . -B build/cuda -DRESM_CUDA=ON -DRESM_WERROR=ON \
  -DPython_EXECUTABLE="$PWD/.venv/bin/python" -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" >/dev/null
cmake --build build/cuda --verbose >"$log" 2>&1 || { tail -n 40 "$log"; exit 1; }
grep -E "Compiling entry function|registers|spill" "$log" | sed 's/^ptxas info *: //'
if grep -E "[1-9][0-9]* bytes spill" "$log" >/dev/null; then
  echo "error: a kernel spills registers" >&2
  exit 1
fi
