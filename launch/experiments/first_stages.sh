#!/usr/bin/env bash
# First stages by f and kind: how well they reconstruct, as the paper's Table 8 in small.
#   launch/experiments/first_stages.sh [DIR]
source "$(dirname "$0")/common.sh"

for f in ${FACTORS:-2 4 8}; do
    argument="$([[ $f == 4 ]] || echo "f$f")"
    first_stage "kl$f" "$argument"
    first_stage "vq$f" "vq${argument:+,$argument}"
    stages+=("$runs/kl$f" "$runs/vq$f")
done
$measure first_stages "${stages[@]}" "$number" --out="$runs/first_stages"
