# shellcheck shell=bash
# Functions for launch/multinode.sh; sourced, never run. Sets ROOT and TORCHRUN and changes to ROOT.
# `python -m dsv2 train` does the same for one machine (dsv2/cli/train.py); keep both alike.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT" || exit

# Print the calling script's header comment: its usage.
usage() {
    sed -n '2,/^$/s/^# \{0,1\}//p' "$1"
}

die() {
    echo "$0: $*" >&2
    exit 2
}

if [[ -x .venv/bin/torchrun ]]; then
    TORCHRUN=.venv/bin/torchrun
else
    TORCHRUN=torchrun
fi

# Print the number of GPUs that train.py will use on this machine: 0 if an override says runtime.device=cpu.
count_gpus() {
    local override
    for override in "$@"; do
        if [[ $override == runtime.device=cpu ]]; then
            echo 0
            return
        fi
    done
    if ! command -v nvidia-smi >/dev/null; then
        echo 0
    elif [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        # Numbers or UUIDs; an empty list and -1 hide every GPU.
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^ *[0-9GM]' || true
    else
        nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true
    fi
}

# Print the number of processes for this machine: NPROC if given, else one per GPU, else two on the CPU.
count_processes() {
    local gpus
    gpus=$(count_gpus "$@")
    if [[ -n ${NPROC:-} ]]; then
        [[ $NPROC =~ ^[1-9][0-9]*$ ]] || die "NPROC=$NPROC: it must be a whole number, at least 1"
        echo "$NPROC"
    elif ((gpus > 0)); then
        echo "$gpus"
    else
        echo 2
    fi
}

# Print a torchrun command and become it. Signals then reach torchrun, which passes them on to train.py.
run_torchrun() {
    local processes=$1
    shift
    command -v "$TORCHRUN" >/dev/null || die "no torchrun: run 'make train', or activate an environment"
    # torchrun's own default is 1 thread per process, which leaves cores idle.
    local threads=$(($(nproc) / processes))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
    # torchrun's own default, 30 s, is too short to save a large model after a signal.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
    # By default glibc gives a freed tensor's memory back, and the kernel clears it page by page for the next
    # tensor. That takes a tenth of a small model's time on the CPU. These values keep blocks of up to 32 MiB.
    export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-33554432}
    export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-268435456}
    local name
    printf '+ '
    for name in OMP_NUM_THREADS TORCH_ELASTIC_SHUTDOWN_TIMEOUT MALLOC_MMAP_THRESHOLD_ MALLOC_TRIM_THRESHOLD_; do
        printf '%s=%s ' "$name" "${!name}"
    done
    printf '%s' "$TORCHRUN"
    printf ' %q' "$@"
    printf '\n'
    exec "$TORCHRUN" "$@"
}
