#!/usr/bin/env bash
# Builds the extension with sanitizers, into build/sanitize, and runs the tests of the native ops on these builds:
#   address   AddressSanitizer and UndefinedBehaviourSanitizer: accesses outside of memory, misaligned ones, overflows
#   thread    ThreadSanitizer: data races
# `sanitize.sh address` and `sanitize.sh thread` run one of them; more arguments replace the tests (pytest's arguments).
# The compiler is $CXX or c++; $PYTHON or python3 has what the tests need. The installed extension is left as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-python3}")
compiler=${CXX:-c++}
kinds=(address thread)
if [ $# -gt 0 ]; then
  kinds=("$1")
  shift
fi
PATH="$(dirname "$python"):$PATH"  # which may hold cmake and ninja

# Tests of memory limits: the sanitizers reserve address space by the terabyte, and end a process that gets no memory.
no_limits=(test_threads_that_cannot_be_started_are_an_error_and_the_next_call_works
  test_no_memory_for_scratch_is_an_error_and_the_next_call_works)
# ThreadSanitizer cannot follow threads that start in a fork of a process with several threads.
no_forks=(test_forked_processes_have_threads_of_their_own test_fork_while_another_thread_is_in_a_call)

op_tests() {
  for op in resm_kernels/ops/[a-z]*.py; do echo "tests/test_$(basename "$op")"; done
  ls tests/test_op_contract.py tests/test_native_*.py
}

# The shared runtime libraries of a kind, which must be loaded before Python. A program with the error that the kind
# finds shows that they work: it must fail. Prints nothing where the compiler has no such runtime.
runtime_of() {
  local program=build/sanitize/$1/works flags=(-std=c++20 -g -O1 -pthread -x c++ -)
  case $1 in
    address) flags=(-fsanitize=address,undefined "${flags[@]}") ;;
    thread) flags=(-fsanitize=thread "${flags[@]}") ;;
    *) echo "sanitize: got $1, need address or thread" >&2; exit 2 ;;
  esac
  "$compiler" "${flags[@]}" -o "$program" 2>"$program.log" <<'SOURCE' || return 0
#include <thread>
int* shared = new int[4];
int main(int n, char**) {
  std::thread other([&] { shared[3 * n] = 1; });
  shared[3 * n] = 2;
  other.join();
#if defined(__SANITIZE_ADDRESS__)
  shared[4 * n] = 3;
#endif
}
SOURCE
  if "$program" >"$program.log" 2>&1 || ! grep -q 'Sanitizer: ' "$program.log"; then return 0; fi
  ldd "$program" | awk '/lib[atu]b?san/ { print $3 }'
}

run() {
  local kind=$1 folder=$PWD/build/sanitize/$1 left_out=("${no_limits[@]}") libraries
  shift
  mkdir -p "$folder"
  libraries=$(runtime_of "$kind")
  if [ -z "$libraries" ]; then
    echo "skipped: $compiler has no shared runtime of the $kind sanitizer that works here ($folder/works.log)"
    return
  fi
  cmake -G Ninja -S . -B "$folder" -DRESM_SANITIZE="$kind" -DCMAKE_CXX_COMPILER="$compiler" \
    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$folder" -DPython_EXECUTABLE="$python" \
    -Dnanobind_DIR="$("$python" -m nanobind --cmake_dir)" >"$folder/cmake.log" || { cat "$folder/cmake.log"; return 1; }
  cmake --build "$folder"
  # Python's own memory pools would hide errors. New memory is filled with NaN, so that results that depend on
  # uninitialised memory fail their tests. No look for leaks: Python frees little at its end. detect_stack_use_after_return
  # stays off: GCC before 13.3 then misaligns vectors on the stack (its bug 110027).
  local settings=(ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=0:max_malloc_fill_size=1000000000:malloc_fill_byte=255"
    UBSAN_OPTIONS="print_stacktrace=1" PYTHONMALLOC=malloc)
  if [ "$kind" = thread ]; then
    settings=(TSAN_OPTIONS="suppressions=$PWD/scripts/sanitize/thread.supp")
    left_out+=("${no_forks[@]}")
  fi
  settings+=(LD_PRELOAD="${libraries//$'\n'/ }" PYTHONPATH="$PWD/scripts/sanitize:$PWD"
    RESM_NATIVE_FILE="$(echo "$folder"/_native*.so)")
  env "${settings[@]}" "$python" -c "
from resm_kernels._extension import native
assert native and native.__file__.startswith('$folder'), native
assert b'__${kind:0:1}san_' in open(native.__file__, 'rb').read(), 'the extension is built without the sanitizer'"
  # Not pytest's own handler of crashes, nor its capture of file descriptors: they would hide the sanitizers' reports.
  env "${settings[@]}" "$python" -m pytest -q -p no:faulthandler -p no:cacheprovider --capture=sys --timeout 0 \
    "${left_out[@]/#/--deselect=tests/test_native_threads.py::}" "$@"
}

if [ $# -eq 0 ]; then
  mapfile -t tests < <(op_tests)
  set -- "${tests[@]}"
fi
for kind in "${kinds[@]}"; do
  echo "== $kind"
  run "$kind" "$@"
done
