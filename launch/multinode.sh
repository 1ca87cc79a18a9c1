#!/usr/bin/env bash
# Train on several machines: run this once on each of them, in any order, with the same overrides.
#
# Usage:    NNODES=N HEAD=host:port [NODE_RANK=R] [NPROC=N] [RDZV_ID=ID] launch/multinode.sh [overrides...]
# Example:  NNODES=2 HEAD=node0:29500 launch/multinode.sh name=lite model=lite runtime=gpu
#
# HEAD is one of the machines and a free port on it. Each machine finds out by its name whether it is HEAD. If
# names do not resolve to the machine itself (containers, NAT), give NODE_RANK=0 on HEAD and 1, 2, ... elsewhere.
# NPROC is the number of processes on this machine (default: one per GPU, or two without GPUs). Each job needs a
# port of its own. RDZV_ID names the job: HEAD refuses a machine of another job. runs_dir must be on a file system
# that all machines share.
#
# No connection between the machines has a password, so let a firewall keep everyone else out. HEAD's port accepts
# all machines of the job. gloo and NCCL also listen on ports of net.ipv4.ip_local_port_range on every machine;
# GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose the interface. RoCE uses UDP port 4791.

set -euo pipefail
if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi
[[ -n ${NNODES:-} ]] || { echo "error: NNODES: must be given, the number of machines" >&2; exit 2; }
exec "$(dirname "${BASH_SOURCE[0]}")/local.sh" "$@"  # which reads these variables
