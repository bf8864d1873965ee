#!/usr/bin/env bash
# Fuzzes each target of tests/fuzz/fuzz.py for SECONDS (default 60), from the corpus that is kept; what is found on the
# way stays in .cache/fuzz.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
python3 scripts/dev.py fuzz-setup
for target in sysfs config messages; do
  mkdir -p ".cache/fuzz/$target"
  echo "fuzz: $target for $seconds s"
  (cd .cache/fuzz && PYTHONPATH=../.. ../../.venv/bin/python ../../tests/fuzz/fuzz.py "$target" \
    -max_total_time="$seconds" -verbosity=0 -print_final_stats=1 "$target" "../../tests/fuzz/corpus/$target" 2>&1 |
    grep -E "number_of_executed_units|crash|ERROR|Error|Traceback" || true; exit "${PIPESTATUS[0]}")
done
