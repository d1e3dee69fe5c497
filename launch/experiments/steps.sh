#!/usr/bin/env bash
# Samplers by numbers of steps, on LDM-4 of the sweep, or on another model of the shapes.
#   [MODEL=runs/shapes/ldm] launch/experiments/steps.sh [DIR]
source "$(dirname "$0")/common.sh"

[[ -n ${MODEL:-} ]] || model 4
$measure steps "${MODEL:-$runs/ldm4}" "$number" --out="$runs/steps"
