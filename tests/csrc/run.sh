#!/bin/bash
# Builds the C++ core with its tests under AddressSanitizer + UBSan and under ThreadSanitizer, runs
# them and fuzzes for a while. Needs g++ alone. R2EC_FUZZ_SECONDS (default 20), R2EC_FUZZ_SEED (1).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
core=$(cd "$here/../../csrc" && pwd)
kernels=$(cd "$here/../../kernels/csrc" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cxx=${CXX:-g++}
flags=(-std=c++17 -O1 -g -Wall -Wextra -Werror -fno-omit-frame-pointer -pthread "-I$core" "-I$kernels" "-I$here"
  -Wno-maybe-uninitialized -Wno-uninitialized)  # gcc on its own header of AVX-512

compile() { # NAME SANITIZERS: objects of the core and every test of $here
  local dir=$work/$1 sanitize=-fsanitize=$2 unit pids=()
  mkdir "$dir"
  for unit in "$core"/*.cpp "$kernels"/*.cpp "$here"/test_*.cpp "$here"/fuzz.cpp; do
    [[ $unit == */bindings.cpp || ( $1 == thread && $unit == */fuzz.cpp ) ]] && continue
    "$cxx" "${flags[@]}" "$sanitize" -fno-sanitize-recover=all -c "$unit" \
      -o "$dir/$(basename "$unit" .cpp).o" &
    pids+=($!)
  done
  for unit in "${pids[@]}"; do wait "$unit"; done
  local objects=()
  for unit in "$dir"/*.o; do
    [[ $unit == */test_*.o || $unit == */fuzz.o ]] || objects+=("$unit")
  done
  for unit in "$dir"/test_*.o "$dir"/fuzz.o; do
    [[ -f $unit ]] || continue
    "$cxx" "$sanitize" -pthread "$unit" "${objects[@]}" -o "${unit%.o}"
  done
}

compile address address,undefined
compile thread thread
for sanitizer in address thread; do
  for program in packer assembler first_pass; do
    echo "== $program, -fsanitize=$sanitizer"
    "$work/$sanitizer/test_$program"
  done
done
echo "== fuzz, -fsanitize=address,undefined"
"$work/address/fuzz" "${R2EC_FUZZ_SECONDS:-20}" "${R2EC_FUZZ_SEED:-1}"
