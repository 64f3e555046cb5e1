#!/bin/sh
# The exit codes of the README, one run each, as a pipeline sees them: tests/exit_codes.sh [COMMAND ...]
#
# COMMAND is how to call the program, "onnxprune" by default. Prints a line per code, in the words of TAP; ends with 1 where one
# is another than promised, says more than three lines, or leaves a file behind that it must not.
set -u
[ $# -gt 0 ] || set -- onnxprune
here=$(cd "$(dirname "$0")" && pwd)
digits=$here/../fixtures/digits
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1
count=0
failures=0

# expect CODE WHAT COMMAND...: run it, compare its exit code, and see that an error takes one to three lines on stderr.
expect() {
    code=$1 what=$2
    shift 2
    "$@" >stdout 2>stderr </dev/null
    judge "$code" "$what" $?
}

judge() {
    count=$((count + 1))
    lines=$(grep -c '^' stderr)
    if [ "$3" -eq "$1" ] && { [ "$1" -eq 0 ] || { [ "$lines" -ge 1 ] && [ "$lines" -le 3 ]; }; }; then
        echo "ok $count - $1 $2"
    else
        failures=$((failures + 1))
        echo "not ok $count - $2: exit code $3, expected $1"
        sed 's/^/# /' stderr
    fi
}

# absent FILE: nothing was written there.
absent() {
    [ ! -e "$1" ] || { failures=$((failures + 1)); echo "# $1 was written"; }
}

model=$digits/digits.onnx
quick="--no-latency -q"

# shellcheck disable=SC2086
{
    expect 0 "done" "$@" "$model" small.onnx --target-mac 0.8 --plan-out plan.json --json report.json $quick
    expect 2 "OUT exists without --force" "$@" "$model" small.onnx --target-mac 0.8 $quick
    head -c 1000 "$model" >half.onnx
    expect 3 "the model is cut off" "$@" half.onnx out.onnx --target-mac 0.8 $quick
    expect 4 "the target is out of reach" "$@" "$model" out.onnx --target-mac 0.001 --json failed.json $quick
    grep -q '"code": 4' failed.json || { failures=$((failures + 1)); echo "# failed.json lacks the error"; }
    expect 5 "PRUNED is not what the plan makes" "$@" verify "$model" "$model" --plan plan.json -q
    expect 6 "the guard is not met" "$@" "$model" out.onnx --target-mac 0.2 $quick \
        --data "$digits/digits_eval.npz" --metric top1 --max-drop 1
    expect 7 "no such file" "$@" nowhere.onnx out.onnx --target-mac 0.8 $quick

    # A criterion that is installed beside the program: a bug in it is an internal error, and one of them presses Ctrl-C.
    mkdir plugins plugins/bug-1.dist-info
    cat >plugins/bug.py <<'EOF'
import signal
def criterion(weight): raise ZeroDivisionError("by design")
def interrupt(weight):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.raise_signal(signal.SIGINT)
EOF
    printf 'Name: bug\nVersion: 1\n' >plugins/bug-1.dist-info/METADATA
    printf '[onnxprune.criteria]\nbug = bug:criterion\nctrl-c = bug:interrupt\n' >plugins/bug-1.dist-info/entry_points.txt
    PYTHONPATH=$work/plugins${PYTHONPATH:+:$PYTHONPATH}
    export PYTHONPATH
    expect 1 "internal error" "$@" "$model" out.onnx --target-mac 0.8 $quick --criterion bug
    expect 130 "interrupted" "$@" "$model" out.onnx --target-mac 0.8 $quick --criterion ctrl-c
}
absent out.onnx
echo "1..$count"
[ "$failures" -eq 0 ]
