#!/usr/bin/env bash
# Train on this machine: one process a GPU, or two processes on the CPU where there is none. The quickstart
# takes 1, 2, 4 or 8 GPUs, which its batch of 8 sequences can be shared among.
#
# Usage:    [NPROC=N] launch/local.sh [overrides...]
# Example:  launch/local.sh experiment=quickstart name=first optim.lr=3e-4
#
# The overrides go to train.py (Hydra). NPROC sets the number of processes, CUDA_VISIBLE_DEVICES the GPUs,
# OMP_NUM_THREADS the threads a process (else the cores are shared out). On Ctrl-C or SIGTERM train.py saves
# and ends well; torchrun itself then always prints a SignalException and exits 1. After 120 s
# (TORCH_ELASTIC_SHUTDOWN_TIMEOUT) it kills what still runs.

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    usage "launch/${0##*/}"
    exit 0
fi

processes=$(count_processes "$@")
if [[ -z ${NPROC:-} && " $* " == *" experiment=quickstart "* ]]; then
    gpus=$processes
    for processes in 8 4 2 1; do
        ((processes > gpus)) || break
    done
    ((processes == gpus)) || echo "quickstart: $processes processes on $gpus GPUs; NPROC=N starts N"
fi
extra=()
if [[ $processes == 1 && "$*" != *parallel.expert_parallel_size=* ]]; then
    echo "one process: appending parallel.expert_parallel_size=1, whatever the experiment says"
    extra=(parallel.expert_parallel_size=1)
fi
if [[ " $* " == *" experiment=quickstart "* && "$*" != *runtime.micro_batch_size=* ]]; then
    case $processes in 4 | 8)
        echo "quickstart: appending runtime.micro_batch_size=$((8 / processes)), a process's share of its batch"
        extra=(runtime.micro_batch_size=$((8 / processes)))
        ;;
    esac
fi
# A mistake is one line and exit code 2 here; torchrun would add its own report and exit with 1.
command -v "$PYTHON" >/dev/null || die "no $PYTHON: run 'make train', or activate an environment"
if [[ ${1:-} == -* ]]; then
    exec "$PYTHON" train.py "$@" # a question to Hydra, such as --cfg job
fi
"$PYTHON" -m dsv2 check "$processes" "$@" "${extra[@]}"
run_torchrun "$processes" --standalone --nproc_per_node="$processes" train.py "$@" "${extra[@]}"
