#!/usr/bin/env bash
# Half an hour on a card, in stages that each end within ten minutes and leave their figures and logs in $OUT.
#   scripts/gpu.sh check      versions, the main job, and the tests that need a card
#   scripts/gpu.sh bench      steps, epochs and selection beside plain baselines: scripts/bench_gpu.py
#   scripts/gpu.sh large      selection among a hundred million samples
#   scripts/gpu.sh several    one, two and four runs at once on the card; with MPS=1 through NVIDIA's MPS
#   scripts/gpu.sh run        a paper-scale run on CIFAR-100 in $DATA: stops after 540 s, and goes on when called again
# The run itself lies in $RUNS, where its checkpoint stays; its record is copied. CUDA_DRY=1 walks a stage on the CPU.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
OUT=$(realpath -m "${OUT:-results/gpu}")
RUNS=$(realpath -m "${RUNS:-results/gpu}")
DATA=${DATA:-data}
DRY=${CUDA_DRY:-0}
LIMIT=${LIMIT:-540}    # seconds from here on, after which whatever still runs is asked to stop
GRACE=45               # seconds to do so in
STAGE=${1:-}
export PYTHONPATH=src:scripts${PYTHONPATH:+:$PYTHONPATH}

fail() { echo "$1" >&2; exit 2; }

# In the foreground: otherwise timeout signals its whole group, and so a run twice, which then ends without a checkpoint.
limited() {
    local left=$((LIMIT - SECONDS))
    ((left > 0)) || { echo "no time is left for: $*" >&2; return 124; }
    timeout --foreground --preserve-status --signal=TERM --kill-after=$GRACE "$left" "$@"
}

check() {
    "$PYTHON" -m torch.utils.collect_env >"$OUT/environment.txt"
    grep -E '^(PyTorch version|CUDA used|Python version|GPU models|GPU [0-9]|Nvidia driver|cuDNN)' "$OUT/environment.txt" || true
    ((DRY)) || "$PYTHON" -c 'import sys, torch; torch.cuda.is_available() or sys.exit("torch sees no CUDA device")'
    limited "$PYTHON" -m alignprune_exp.train "device=$device" force=true "paths.results=$OUT/main"
    limited "$PYTHON" -m pytest -m cuda -ra -p no:cacheprovider "--junitxml=$OUT/cuda.xml"
}

# Runs the benchmark, with a file's name and options, at small sizes where there is no card.
measured() {
    local dry=()
    ((DRY)) && dry=(--dry)
    limited "$PYTHON" scripts/bench_gpu.py "${dry[@]}" --json "$OUT/$1.json" "${@:2}"
}

bench() { measured bench; }

large() {
    local all=(--large)
    ((DRY)) && all=()
    measured large --part selection "${all[@]}"
}

several() {
    local name=several
    if [[ ${MPS:-0} == 1 ]]; then
        command -v nvidia-cuda-mps-control >/dev/null || fail "nvidia-cuda-mps-control is not found; leave MPS=1 out"
        CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d)
        CUDA_MPS_LOG_DIRECTORY=$CUDA_MPS_PIPE_DIRECTORY
        export CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
        nvidia-cuda-mps-control -d
        trap 'echo quit | nvidia-cuda-mps-control; rm -rf "$CUDA_MPS_PIPE_DIRECTORY"' EXIT
        name=several-mps
    fi
    measured "$name" --part several
}

run() {
    local line=(dataset=cifar100 "paths.data=$DATA" scale=paper noise=sym0.5) status=0
    ((DRY)) && line=(dataset=digits scale=smoke epochs=400)
    limited "$PYTHON" -m alignprune_exp.train "${line[@]}" "device=$device" "paths.results=$RUNS" || status=$?
    if [[ $OUT != "$RUNS" && -d $RUNS/runs ]]; then
        tar -C "$RUNS" --exclude='checkpoint-*' --exclude=lock -cf - runs | tar -C "$OUT" -xf -
    fi
    if ((status == 130)); then
        echo "to go on: scripts/gpu.sh run"
        return 0
    fi
    return $status
}

case $STAGE in
    check | bench | large | several | run) ;;
    *) fail "usage: [CUDA_DRY=1] [OUT=folder] [DATA=folder] scripts/gpu.sh check|bench|large|several|run" ;;
esac
device=cuda
((DRY)) && device=cpu
mkdir -p "$OUT"
"$STAGE" 2>&1 | tee -a "$OUT/$STAGE.log"
