#!/usr/bin/env bash
# Train on several machines: run this once on each of them, in any order, with the same overrides.
#
# Usage:    NNODES=N HEAD=host:port [NODE_RANK=R] [NPROC=N] [RDZV_ID=ID] launch/multinode.sh [overrides...]
# Example:  NNODES=2 HEAD=node0:29500 launch/multinode.sh name=lite model=lite runtime=gpu
#
# HEAD is one of the machines and a free port on it. Each machine finds out by its name whether it is HEAD. If
# names do not resolve to the machine itself (containers, NAT), give NODE_RANK=0 on HEAD and 1, 2, ... elsewhere.
# NPROC is the number of processes on this machine (default: one per GPU, or two without GPUs). Jobs that share a
# HEAD need different values of RDZV_ID. runs_dir must be on a file system that all machines share.

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    usage "launch/${0##*/}"
    exit 0
fi
[[ ${NNODES:-} =~ ^[1-9][0-9]*$ ]] || die "NNODES=${NNODES:-}: it must be the number of machines"
[[ ${HEAD:-} =~ ^.+:[0-9]+$ ]] || die "HEAD=${HEAD:-}: it must be host:port of one of the machines"
[[ ${NODE_RANK:-0} =~ ^[0-9]+$ ]] || die "NODE_RANK=$NODE_RANK: it must be a whole number, 0 on HEAD"

processes=$(count_processes "$@")
host=()
if [[ -n ${NODE_RANK:-} ]]; then
    # The c10d rendezvous knows no node rank; all it needs is which machine opens HEAD's port.
    host=(--rdzv_conf="is_host=$([[ $NODE_RANK == 0 ]] && echo true || echo false)")
fi
run_torchrun "$processes" --nnodes="$NNODES" --nproc_per_node="$processes" \
    --rdzv_backend=c10d --rdzv_endpoint="$HEAD" --rdzv_id="${RDZV_ID:-dsv2}" "${host[@]}" train.py "$@"
