# What the scripts of this folder share; each takes the folder of the runs as its argument.
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
runs="${1:-runs/experiments}"
run="$here/../local.sh python -m latent_diffusion_jax"
measure="$here/../local.sh python -m benchmarks.experiments"
number="--number=${NUMBER:-96}"

# first_stage NAME ARGUMENT: trained in $runs/NAME, alike for all but in f and kind
first_stage() {
    $run train --config="configs/first_stage/shapes.py:$2" --workdir="$runs/$1" \
        --config.run.steps="${AE_STEPS:-300}" \
        --config.optim.schedule.max_decay_steps="${AE_STEPS:-300}"
}

# model F: LDM-F of configs/diffusion/shapes_sweep.py, trained in $runs/ldmF
model() {
    local given=(
        --config="configs/diffusion/shapes_sweep.py:$1${ARGUMENT:-}"
        --workdir="$runs/ldm$1" --config.run.first_stage="$runs/kl$1"
    )
    if [[ $1 != 1 ]]; then
        first_stage "kl$1" "$([[ $1 == 4 ]] || echo "f$1")"
        $run encode "${given[@]}"
    fi
    $run train "${given[@]}"
}
