#!/usr/bin/env bash
# Runs a command as N processes of one run on this machine, over loopback, as N hosts would:
#   launch/multiprocess.sh N [--devices=D] [--port=P] command...
# D fake CPU devices each (default: those there are). Lines begin with the process's number; the
# exit code is the first that is not 0. --dry_run prints what it would do.
set -euo pipefail

usage() { sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[[ "${1:-}" =~ ^[1-9][0-9]*$ ]] || usage
count=$1 devices="" port=$((20000 + $$ % 20000)) dry=""
shift
while [[ "${1:-}" == --* ]]; do
  case "$1" in
    --devices=*) devices="${1#*=}" ;;
    --port=*) port="${1#*=}" ;;
    --dry_run) dry=echo ;;
    *) usage ;;
  esac
  shift
done
[[ $# -gt 0 ]] || usage

export JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" JAX_NUM_PROCESSES="$count"
if [[ -n "$devices" ]]; then
  export JAX_PLATFORMS=cpu
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
fi
if [[ -n "$dry" ]]; then
  for ((i = 0; i < count; i++)); do
    echo "JAX_COORDINATOR_ADDRESS=$JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES=$count" \
      "JAX_PROCESS_ID=$i ${devices:+XLA_FLAGS=\"$XLA_FLAGS\" }$*"
  done
  exit
fi

pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM
for ((i = 0; i < count; i++)); do
  JAX_PROCESS_ID=$i "$@" > >(sed -u "s/^/[$i] /") 2> >(sed -u "s/^/[$i] /" >&2) &
  pids+=($!)
done
code=0
for pid in "${pids[@]}"; do
  while true; do
    status=0
    wait "$pid" || status=$?
    kill -0 "$pid" 2>/dev/null || break # a signal ended the wait, not the process
  done
  ((code)) || code=$status
done
exit "$code"
