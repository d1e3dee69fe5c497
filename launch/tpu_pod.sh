#!/usr/bin/env bash
# A training on a Cloud TPU slice of any size, by gcloud's queued resources:
#   launch/tpu_pod.sh run NAME --zone=us-west4-a --type=v5litepod-256 [--spot] [--project=P] \
#       [--runtime=v2-alpha-tpuv5-lite] [--slices=N] -- \
#       python -m latent_diffusion_jax train --config=... --workdir=gs://bucket/run
#   launch/tpu_pod.sh status|stop|logs|delete NAME --zone=... [--project=P]
# `run` asks for the slice (unless there is one of that name), waits for it, copies the committed
# code to every worker, installs it, and runs the command on all of them. A slice that is preempted
# is asked for again and the command resumes, until it ends by itself; `delete` gives the slice
# back. `stop` saves first. --dry_run prints the commands.
set -euo pipefail

usage() { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }
fail() { echo "error: $*" >&2; exit 2; }
[[ $# -ge 2 ]] || usage
verb=$1 name=$2
shift 2
zone="" type="" runtime="v2-alpha-tpuv5-lite" slices=1 project=() spot=() dry=""
while [[ $# -gt 0 && "$1" != -- ]]; do
  case "$1" in
    --zone=*) zone="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --runtime=*) runtime="${1#*=}" ;;
    --slices=*) slices="${1#*=}" ;;
    --project=*) project=("$1") ;;
    --spot) spot=(--spot) ;;
    --dry_run) dry=yes ;;
    *) fail "unknown option $1" ;;
  esac
  shift
done
[[ -n "$zone" ]] || fail "give --zone=ZONE"
place=(--zone="$zone" "${project[@]}")
[[ "$slices" =~ ^[1-9][0-9]*$ ]] || fail "--slices=$slices is not a number from 1 on"

call() {
  if [[ -n "$dry" ]]; then
    echo "$(printf '%q ' "$@")"
  else
    "$@"
  fi
}
tpu() { call gcloud compute tpus "$@" "${place[@]}"; }

# The state of the queued resource: ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED ...; empty if none.
state() {
  [[ -z "$dry" ]] || { echo "$dry_state"; return; }
  gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
    --format='value(state.state)' 2>/dev/null || true
}
nodes() {
  if ((slices == 1)); then
    echo "$name"
  else
    for ((i = 0; i < slices; i++)); do echo "$name-$i"; done
  fi
}
everywhere() {
  for node in $(nodes); do
    tpu tpu-vm ssh "$node" --worker=all --command="$1" &
    pids+=($!)
  done
  local code=0 pid
  for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
  pids=()
  return "$code"
}
pids=()
dry_state=""

ask() {
  local node=(--node-id="$name")
  ((slices == 1)) || node=(--node-prefix="$name" --node-count="$slices")
  tpu queued-resources create "$name" "${node[@]}" --accelerator-type="$type" \
    --runtime-version="$runtime" "${spot[@]}"
  dry_state=ACTIVE
}
await() {
  local now
  while true; do
    now=$(state)
    case "$now" in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING)
        tpu queued-resources delete "$name" --force --quiet
        ask
        ;;
      *) echo "$(date +%T) $name: ${now:-unknown}" ;;
    esac
    sleep 30
  done
}
install() {
  local archive
  archive=$(mktemp)
  git archive --format=tar.gz -o "$archive" HEAD
  for node in $(nodes); do
    tpu tpu-vm scp "$archive" "$node:code.tar.gz" --worker=all
  done
  rm -f "$archive"
  everywhere "rm -rf code && mkdir code && tar -xzf code.tar.gz -C code && cd code \
&& python3 -m venv ~/venv && ~/venv/bin/pip install -q -e '.[tpu,gcs]'"
}

case "$verb" in
  run)
    [[ "${1:-}" == -- && $# -gt 1 ]] || fail "give the command behind --"
    shift
    [[ -n "$type" ]] || fail "give --type=ACCELERATOR, such as v5litepod-256"
    printf -v command '%q ' "$@"
    flags=$(tr '\n' ' ' < "$(dirname "$0")/xla_flags/tpu.txt")
    job="cd code && PATH=~/venv/bin:\$PATH LIBTPU_INIT_ARGS='$flags' $command"
    # The job outlives this terminal; its log is on every worker.
    [[ -n "$(state)" ]] || ask
    while true; do
      await
      install
      if everywhere "($job) 2>&1 | tee -a run.log; exit \${PIPESTATUS[0]}"; then
        break
      fi
      sleep 60 # a preemption is not in the state at once
      [[ "$(state)" != ACTIVE ]] || fail "the command failed on $name: see above"
      echo "$(date +%T) $name was preempted: asking for it again"
    done
    ;;
  status) tpu queued-resources describe "$name" ;;
  logs) everywhere "tail -n 20 run.log" ;;
  stop) everywhere "pkill -TERM -f '[l]atent_diffusion_jax'" ;; # not this command itself
  delete) tpu queued-resources delete "$name" --force --quiet ;;
  *) usage ;;
esac
