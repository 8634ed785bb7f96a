#!/usr/bin/env bash
# Runs everything that needs a GPU, with the installed packages and no network: build, tests, memory checker, benchmarks.
# After a step that fails the next ones still run; the exit status says whether all passed. `gpu.sh --quick` takes less time.
# `gpu.sh --dry-run` needs no GPU: it builds, collects the tests, and runs the benchmarks on small CPU tensors, in Triton's
# interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
arch=${RESM_CUDA_ARCHITECTURES:-90-real}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=0
mode=${1:-}  # --quick: fewer rounds, smaller models
tests=(tests/test_gpu.py tests/test_device_cuda.py tests/test_cuda.py tests/test_triton.py)
results=benchmarks/results
step() {
  echo "== $1"
  shift
  "$@" || { echo "FAILED: $*" >&2; failed=1; }
}
build() {
  mkdir -p build/gpu &&
    cmake --fresh -G Ninja -S . -B build/gpu -DRESM_CUDA=ON -DRESM_CUDA_ARCHITECTURES="$arch" \
      -DPython_EXECUTABLE="$(command -v "$python")" -Dnanobind_DIR="$("$python" -m nanobind --cmake_dir)" &&
    cmake --build build/gpu &&
    rm -f "resm_kernels/_native$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')" &&
    install build/gpu/_native*.so resm_kernels/
}
step "build for $arch" build
if [ "$mode" = --dry-run ]; then
  step "GPU tests, collected" "$python" -m pytest "${tests[@]}" -q --collect-only
  step "benchmarks, dry run" env TRITON_INTERPRET=1 "$python" -m benchmarks.bench_gpu --dry-run --json build/gpu/dry.json
  step "benchmark from files, dry run" "$python" -m benchmarks.bench_gpu_checkpoint --device cpu --layers 1 --hidden 64 \
    --intermediate 96 --vocabulary 100 --runs 1 --json build/gpu/dry_checkpoint.json
  exit $failed
fi
step "the extension and the GPU are live" "$python" -c "
import resm_kernels
facts = resm_kernels.backends()
print(facts)
assert facts['native']['cuda'] and facts['gpu'], 'need a build with CUDA and a visible GPU'"
export RESM_REQUIRE_GPU=1
step "GPU tests" "$python" -m pytest "${tests[@]}" -q
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck synccheck; do
    step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m pytest "${tests[@]:0:3}" -q -k "small"
  done
  step "memcheck, Triton" compute-sanitizer --error-exitcode 1 "$python" -m pytest tests/test_triton.py -q -k "mixed_dtypes_and_layouts or not_finite or empty"
else
  echo "skipped: no compute-sanitizer on this machine"
fi
step "benchmarks" "$python" -m benchmarks.bench_gpu --json "$results/gpu.json" $mode
layers=4
[ "$mode" = --quick ] && layers=1
step "benchmark from files" "$python" -m benchmarks.bench_gpu_checkpoint --layers $layers --json "$results/gpu_checkpoint.json"
exit $failed
