#!/usr/bin/env bash
# The compression sweep in small, on the embedded shapes: quality against the cost of training and of
# sampling, as figures 6 and 7 of the paper. First stages are all trained alike, models as
# configs/diffusion/shapes_sweep.py says. What is done is skipped, what was interrupted goes on.
#   launch/experiments/compression.sh [DIR]     FACTORS="1 4" AE_STEPS=50 ARGUMENT=,tiny NUMBER=12: smaller
set -euo pipefail
here="$(dirname "$0")/.."
runs="${1:-runs/sweep}"
run="$here/local.sh python -m latent_diffusion_jax"

workdirs=()
for f in ${FACTORS:-1 2 4 8}; do
    config="--config=configs/diffusion/shapes_sweep.py:$f${ARGUMENT:-}"
    given=(--workdir="$runs/ldm$f" --config.run.first_stage="$runs/ae$f")
    if [[ $f != 1 ]]; then
        argument=$([[ $f == 4 ]] || echo "f$f")
        $run train --config="configs/first_stage/shapes.py:$argument" --workdir="$runs/ae$f" \
            --config.run.steps="${AE_STEPS:-300}" \
            --config.optim.schedule.max_decay_steps="${AE_STEPS:-300}"
        $run encode "$config" "${given[@]}"
    fi
    $run train "$config" "${given[@]}"
    workdirs+=("$runs/ldm$f")
done
python -m benchmarks.experiments compression "${workdirs[@]}" --number="${NUMBER:-96}" \
    --out="$runs/compression"
