"""What XLA makes of a training step: its own count of memory, and the collectives in its program.

Beside what `plan.py` expects. The step is compiled ahead of time, for fake CPU devices for
instance, and nothing is run.
"""

import math
import re
from collections import Counter
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from latent_diffusion_jax import build
from latent_diffusion_jax.nn.products import traced_for
from latent_diffusion_jax.plan import step_shapes
from latent_diffusion_jax.train.sharding import (
    batch_sharding,
    lay_out,
    lower_step,
    replicated,
)

COLLECTIVES = {
    "all-gather": "gathered",
    "all-reduce": "reduced",
    "reduce-scatter": "scattered",
    "all-to-all": "moved",
    "collective-permute": "moved",
}
# of machine code, which is never run; the program itself is the same
IN_HASTE: dict[str, str | bool] = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": True,
}


@traced_for("tpu")  # the fake devices stand for those
def measure(config: ConfigDict, mesh: Mesh) -> dict[str, Any]:
    """Compiles the training step for the mesh's devices, runs nothing, and reads off the program.

    `bytes_per_device`: XLA's own analysis. `collectives_per_step`: bytes of whole arrays that are
    gathered, reduced, and moved otherwise.
    """
    objective = build.objective(config, mesh)
    step = step_shapes(config, objective)
    rows = {n: _placed(x, batch_sharding(mesh)) for n, x in step.batch.items()}
    key = _placed(step.key, replicated(mesh))
    state, frozen = lay_out(step.state, mesh), lay_out(step.frozen, mesh)
    lowered = lower_step(objective.train_step, state, frozen, rows, key, mesh)
    compiled = lowered.compile(compiler_options=IN_HASTE)
    memory: Any = compiled.memory_analysis()
    return {
        "bytes_per_device": {
            "arguments": memory.argument_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
            "output": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        },
        "collectives_per_step": collectives(compiled.as_text() or ""),
    }


def _placed(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def collectives(hlo: str) -> dict[str, int]:
    """Bytes of the arrays in a compiled program's collectives; of those in loops, each time.

    `reduced` and then sliced is what CPUs do where accelerators have sums `scattered`.
    """
    own: dict[str, Counter[str]] = {}  # by computation
    calls: dict[str, Counter[str]] = {}
    name = entry = ""
    for line in hlo.splitlines():
        if start := re.match(r"(ENTRY )?%?([\w.-]+) .*{$", line):
            name = start[2]
            entry = name if start[1] else entry
            own[name], calls[name] = Counter(), Counter()
        elif op := re.match(r" +(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z-]+)\(", line):
            if op[2] in COLLECTIVES:
                own[name][COLLECTIVES[op[2]]] += _type_bytes(op[1])
            times = re.search(r'"known_trip_count":{"n":"(\d+)"}', line)
            for called in re.findall(r"(?:calls|to_apply|body)=%?([\w.-]+)", line):
                calls[name][called] += int(times[1]) if times else 1

    def total(name: str) -> Counter[str]:
        found = Counter(own.get(name, {}))
        for called, times in calls.get(name, {}).items():
            found.update({kind: times * size for kind, size in total(called).items()})
        return found

    found = total(entry)
    return {kind: found[kind] for kind in dict.fromkeys(COLLECTIVES.values())}


def _type_bytes(text: str) -> int:
    """Bytes of an HLO type, "(f32[8,3]{1,0}, pred[])"."""
    types = re.findall(r"(?:pred|[a-z]+(\d+))\[([\d,]*)\]", text)
    return sum(
        int(bits or 8) // 8 * math.prod([int(n) for n in shape.split(",") if n])
        for bits, shape in types
    )
