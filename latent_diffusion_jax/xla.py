"""Flags of XLA's that make programs for CPUs faster, and memory that its compiler leaves behind.

Measured in docs/performance.md. Nothing here imports jax.
"""

import contextlib
import ctypes
import importlib.util
import os

FLAGS = {
    # else it has YNNPACK compute convolutions, of up to 64 channels by one thread alone
    "--xla_cpu_experimental_ynn_fusion_type": "-individual_convolution",
    # else a training step copies parameters and moments that it could update in place
    "--xla_cpu_copy_insertion_use_region_analysis": "true",
}


def tune() -> None:
    """Adds `FLAGS` to `XLA_FLAGS`; those that the user has set stand.

    To be called before JAX makes its first array, after which it reads them no more. Does nothing
    where `XLA_FLAGS` names a file, nor beside libtpu: a flag that one of them does not know ends
    the process.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    is_file = flags[:1] not in ("", "-")
    if is_file or importlib.util.find_spec("libtpu") is not None:
        return
    added = [f"{flag}={value}" for flag, value in FLAGS.items() if flag not in flags]
    os.environ["XLA_FLAGS"] = " ".join([flags, *added]).strip()


def give_back_memory() -> None:
    """Gives the system what this process has freed, where its C library can (glibc).

    Compiling frees more than a small model's training needs, and with the settings of
    `launch/local.sh` freed memory is kept.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
