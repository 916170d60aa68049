#!/bin/bash
# Builds the C++ core with its tests under AddressSanitizer + UBSan and under ThreadSanitizer, runs
# them and fuzzes for a while. Needs g++ alone. R2EC_FUZZ_SECONDS (default 20), R2EC_FUZZ_SEED (1).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
core=$root/csrc
kernels=$root/kernels/csrc
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cxx=${CXX:-g++}
flags=(-std=c++17 -O1 -g -Wall -Wextra -Werror -fno-omit-frame-pointer -pthread
  "-I$core" "-I$kernels" "-I$here"
  -Wno-maybe-uninitialized -Wno-uninitialized)  # gcc on its own header of AVX-512

compile() { # NAME SANITIZERS: DIR/core/*.o of both cores, DIR/*.o and a program of every test
  local dir=$work/$1 sanitize=-fsanitize=$2 unit name pids=()
  mkdir -p "$dir/core"
  for unit in "$core"/*.cpp "$kernels"/*.cpp "$kernels"/simd/*.cpp "$here"/*.cpp; do
    [[ $unit == */bindings.cpp || ( $1 == thread && $unit == */fuzz.cpp ) ]] && continue
    name=${unit#"$root"/}  # objects of two folders never share a name
    [[ $unit == "$here"/* ]] && name=$(basename "$unit") || name=core/${name//\//.}
    "$cxx" "${flags[@]}" "$sanitize" -fno-sanitize-recover=all -c "$unit" -o "$dir/${name%.cpp}.o" &
    pids+=($!)
  done
  for unit in "${pids[@]}"; do wait "$unit"; done
  for unit in "$dir"/*.o; do
    "$cxx" "$sanitize" -pthread "$unit" "$dir"/core/*.o -o "${unit%.o}"
  done
}

compile address address,undefined
compile thread thread
for sanitizer in address thread; do
  for test in "$here"/test_*.cpp; do
    test=$(basename "$test" .cpp)
    echo "== $test, -fsanitize=$sanitizer"
    "$work/$sanitizer/$test"
  done
done
echo "== fuzz, -fsanitize=address,undefined"
"$work/address/fuzz" "${R2EC_FUZZ_SECONDS:-20}" "${R2EC_FUZZ_SEED:-1}"
