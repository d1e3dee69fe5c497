#!/usr/bin/env bash
# The compression sweep in small, on the embedded shapes: quality against the cost of training and of
# sampling, as figures 6 and 7 of the paper. What is done is skipped, what was interrupted goes on.
#   launch/experiments/compression.sh [DIR]
#   FACTORS="1 4" AE_STEPS=4 ARGUMENT=,tiny NUMBER=25 launch/experiments/compression.sh DIR     # smoke
source "$(dirname "$0")/common.sh"

for f in ${FACTORS:-1 2 4 8}; do
    model "$f"
    models+=("$runs/ldm$f")
done
$measure compression "${models[@]}" "$number" --out="$runs/compression"
