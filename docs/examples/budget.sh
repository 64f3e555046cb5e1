#!/bin/sh
# Does a committed model still meet its budget, and does its proof still hold?
#
#   budget.sh ORIGINAL PRUNED PLAN SHARE
#
# Ends with 0, with 5 where PRUNED is not what PLAN makes of ORIGINAL, or with 4 where it takes more than SHARE of the MAC of
# ORIGINAL. Needs onnxprune and python3 on the path.
set -eu
original=$1 pruned=$2 plan=$3 share=$4
reports=$(mktemp -d)
trap 'rm -rf "$reports"' EXIT

onnxprune verify "$original" "$pruned" --plan "$plan" -q
onnxprune inspect "$original" --json "$reports/original.json" -q
onnxprune inspect "$pruned" --json "$reports/pruned.json" -q
python3 - "$reports/original.json" "$reports/pruned.json" "$share" <<'EOF'
import json
import sys

before, after = (json.load(open(path, encoding="utf-8"))["cost"]["before"]["mac"] for path in sys.argv[1:3])
share = after / before
print(f"{after} of {before} MAC: {share:.4f}, budget {sys.argv[3]}")
sys.exit(0 if share <= float(sys.argv[3]) else 4)
EOF
