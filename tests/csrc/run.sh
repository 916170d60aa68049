#!/bin/bash
# Builds the C++ core with its tests under AddressSanitizer + UBSan and under ThreadSanitizer, runs
# them and fuzzes for a while. Needs g++ alone. R2EC_FUZZ_SECONDS (default 20), R2EC_FUZZ_SEED (1).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
core=$(cd "$here/../../csrc" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cxx=${CXX:-g++}
flags=(-std=c++17 -O1 -g -Wall -Wextra -Werror -fno-omit-frame-pointer -pthread "-I$core" "-I$here")

compile() { # NAME SANITIZERS: objects of the core and every test of $here
  local dir=$work/$1 sanitize=-fsanitize=$2 unit pids=()
  mkdir "$dir"
  for unit in "$core"/packer.cpp "$core"/assembler.cpp "$here"/test_*.cpp "$here"/fuzz.cpp; do
    [[ $1 == thread && $unit == */fuzz.cpp ]] && continue
    "$cxx" "${flags[@]}" "$sanitize" -fno-sanitize-recover=all -c "$unit" \
      -o "$dir/$(basename "$unit" .cpp).o" &
    pids+=($!)
  done
  for unit in "${pids[@]}"; do wait "$unit"; done
  for unit in "$dir"/test_*.o "$dir"/fuzz.o; do
    [[ -f $unit ]] || continue
    "$cxx" "$sanitize" -pthread "$unit" "$dir/packer.o" "$dir/assembler.o" -o "${unit%.o}"
  done
}

compile address address,undefined
compile thread thread
for sanitizer in address thread; do
  for program in packer assembler; do
    echo "== $program, -fsanitize=$sanitizer"
    "$work/$sanitizer/test_$program"
  done
done
echo "== fuzz, -fsanitize=address,undefined"
"$work/address/fuzz" "${R2EC_FUZZ_SECONDS:-20}" "${R2EC_FUZZ_SEED:-1}"
