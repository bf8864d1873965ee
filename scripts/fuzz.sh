#!/usr/bin/env bash
# Fuzzes each target of tests/fuzz/fuzz.py for SECONDS (default 60), from the corpus that is kept; what is found on the
# way stays in .cache/fuzz. Prints how many inputs were tried; ends at the first failure, with its log and status 1.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
python3 scripts/dev.py fuzz-setup
for target in sysfs config messages uevent cdi http; do
  mkdir -p ".cache/fuzz/$target"
  log=".cache/fuzz/$target.log"
  echo "fuzz: $target for $seconds s"
  if ! (cd .cache/fuzz && PYTHONPATH=../.. ../../.venv/bin/python ../../tests/fuzz/fuzz.py "$target" \
    -max_total_time="$seconds" -verbosity=0 -print_final_stats=1 "$target" "../../tests/fuzz/corpus/$target") >"$log" 2>&1; then
    grep -v "^stat::" "$log" | tail -n 40
    echo "fuzz: $target failed; all of it is in $log" >&2
    exit 1
  fi
  grep "number_of_executed_units" "$log"
done
