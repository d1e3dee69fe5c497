"""What accelerators can do at best, by their vendors' data sheets.

Sources: Google Cloud's pages on TPU v4, v5e, v5p and v6e; NVIDIA's data sheets of A100 80GB, H100
and H200, all SXM and without sparsity. TPUs' v4, v5p and v6e interconnects are stated in Gbit/s.
"""

from typing import Any, NamedTuple


class Chip(NamedTuple):
    """Peaks of one chip.

    bf16: FLOP/s of matrices in bfloat16; tf32: of float32 ones as JAX multiplies them on GPUs by
    default, None on TPUs, which multiply them in bfloat16. hbm: bytes; hbm_speed: bytes/s.
    interconnect: bytes/s that leave the chip over all of its links, in one direction; linked: how
    many chips are joined by it, beyond which there is a slower network.
    """

    bf16: float
    tf32: float | None
    hbm: float
    hbm_speed: float
    interconnect: float
    linked: int

    def peak(self, dtype: str) -> float:
        """FLOP/s of networks that compute in "float32" or "bfloat16"."""
        return self.tf32 if self.tf32 and dtype == "float32" else self.bf16


CHIPS = {
    "v4": Chip(275e12, None, 32e9, 1200e9, 300e9, 4096),
    "v5e": Chip(197e12, None, 16e9, 819e9, 200e9, 256),
    "v5p": Chip(459e12, None, 95e9, 2765e9, 600e9, 8960),
    "v6e": Chip(918e12, None, 32e9, 1600e9, 400e9, 256),
    "a100": Chip(312e12, 156e12, 80e9, 2039e9, 300e9, 8),
    "h100": Chip(989.4e12, 494.7e12, 80e9, 3350e9, 450e9, 8),
    "h200": Chip(989.4e12, 494.7e12, 141e9, 4800e9, 450e9, 8),
}
KINDS = {  # as JAX calls them
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}


def chip_of(device: Any) -> Chip | None:
    """The chip behind a `jax.Device`; None of CPUs and of whatever is not in the table."""
    return CHIPS.get(KINDS.get(device.device_kind, ""))
