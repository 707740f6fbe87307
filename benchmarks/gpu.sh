#!/usr/bin/env bash
# The benchmark of a machine with a GPU: its tests, then every part of gpu.py in a process and a time limit of its own.
# At most 8 minutes on one H100, the parts in the order of their worth; what fails or takes too long costs no other.
#
#   benchmarks/gpu.sh                                     # results in benchmarks/results, a table at the end
#   benchmarks/gpu.sh --autoencoder ../shared/autoencoders/taesd
#   benchmarks/gpu.sh --device cpu --quick                # everything tiny, to see that it runs
#   benchmarks/gpu.sh --parts "train-s2 bare-s2" --seconds 120
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
device=cuda seconds=480 results=$root/benchmarks/results autoencoder=shapes work= quick=
parts="tests train-s2 bare-s2 classic-s2 train-xl2 train-s1 sample encode judge overhead bare-xl2 bare-s1 classic-s1"
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python3)}
while [ $# -gt 0 ]; do
    case $1 in
        --quick) quick=--quick; shift; continue ;;
        --device | --seconds | --results | --autoencoder | --work | --parts)
            [ $# -gt 1 ] || { echo "gpu.sh: $1 needs a value" >&2; exit 2; }
            declare "${1#--}=$2"; shift 2 ;;
        *) echo "gpu.sh: $1 is unknown; --device, --quick, --parts, --seconds, --autoencoder, --results, --work" >&2; exit 2 ;;
    esac
done
own_work=
[ -n "$work" ] || { work=$(mktemp -d) && own_work=$work; }
trap '[ -z "$own_work" ] || rm -rf "$own_work"' EXIT
mkdir -p "$results" "$work"
results=$(cd "$results" && pwd)
export PYTHONPATH=$root/src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 LATENTFLOW_CACHE=$work/remembered
[ "$device" = cuda ] || export CUDA_VISIBLE_DEVICES=

# Seconds that a part may take at most; all of them together may take fewer.
limit() {
    case $1 in
        tests) echo 170 ;;
        train-xl2 | bare-xl2) echo 85 ;;
        train-* | overhead) echo 75 ;;
        sample) echo 110 ;;
        *) echo 60 ;;
    esac
}

run() {
    case $1 in
        tests) run_tests ;;
        overhead)
            "$python" "$root/benchmarks/overhead.py" --device "$device" --results "$results" ${quick:---rounds 50} ;;
        *)
            "$python" "$root/benchmarks/gpu.py" "$1" --device "$device" --results "$results" --work "$work" \
                --autoencoder "$autoencoder" $quick ;;
    esac
}

# A process for each file of tests, side by side: they wait for processes that start, not for the GPU.
run_tests() {
    local file failed=0 running=()
    for file in "$root"/tests/gpu/test_*.py; do
        (cd "$root" && "$python" -m pytest -rs --durations 5 -o faulthandler_timeout=90 --no-header -p no:cacheprovider \
            "$file" > "$work/$(basename "$file").log" 2>&1) &
        running+=($!)
    done
    for file in "${running[@]}"; do wait "$file" || failed=1; done
    return $failed
}
export -f run run_tests
export root python device results work autoencoder quick

code=0
for part in $parts; do
    left=$((seconds - SECONDS)) most=$(limit "$part")
    [ "$most" -le "$left" ] || most=$left
    if [ "$most" -lt 5 ]; then
        echo "== $part: left out, the $seconds seconds are used up"; code=1; continue
    fi
    began=$SECONDS
    timeout -k 5 "$most" bash -c "run $part" > "$work/$part.log" 2>&1
    ended=$?
    echo "== $part: $((SECONDS - began)) s, exit code $ended$([ $ended = 124 ] && echo ", over its limit of $most s")"
    if [ "$part" = tests ]; then
        tail -n 1 "$work"/test_*.py.log
        cat "$work"/test_*.py.log > "$results/gpu_tests-$device.log"
        grep -hE "^(FAILED|ERROR|E  )" "$results/gpu_tests-$device.log" | cut -c 1-200 | head -n 40
    fi
    if [ $ended != 0 ]; then
        code=1
        tail -n 15 "$work/$part.log" | cut -c 1-300
        cp "$work/$part.log" "$results/gpu_$part-$device.failed.log"
    fi
done
echo
"$python" "$root/benchmarks/gpu.py" table --device "$device" --results "$results" || code=1
exit $code
