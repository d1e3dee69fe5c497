#!/usr/bin/env bash
# Lengths of the averages of the weights, chosen after training, on LDM-4 of the sweep.
#   [MODEL=...] launch/experiments/lengths.sh [DIR]
source "$(dirname "$0")/common.sh"

[[ -n ${MODEL:-} ]] || model 4
$measure lengths "${MODEL:-$runs/ldm4}" "$number" --out="$runs/lengths"
