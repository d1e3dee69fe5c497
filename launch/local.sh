#!/usr/bin/env bash
# Runs a command on this machine, all of its devices, with the settings that training wants:
#   launch/local.sh python -m latent_diffusion_jax train --config=... --workdir=...
set -euo pipefail

# glibc gives freed memory back to the system at once and faults it in again at the next step;
# keeping it, in huge pages, takes up to a third off a training step on CPUs.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
export MALLOC_MMAP_MAX_="${MALLOC_MMAP_MAX_:-0}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-9000000000}"
export MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_:-500000000}"
# What threads of the compiler leave in heaps of their own no other thread can use.
export MALLOC_ARENA_MAX="${MALLOC_ARENA_MAX:-2}"

exec "$@"
