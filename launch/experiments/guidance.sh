#!/usr/bin/env bash
# The scale of guidance against quality and diversity, on LDM-4 of the sweep, or on another model.
#   [MODEL=runs/shapes/ldm] launch/experiments/guidance.sh [DIR]
source "$(dirname "$0")/common.sh"

[[ -n ${MODEL:-} ]] || model 4
$measure guidance "${MODEL:-$runs/ldm4}" "$number" --out="$runs/guidance"
