"""What XLA for CPUs is asked for, on one CPU device: which of its libraries compute what.

XLA of jax 0.10 and 0.12 leaves products and sums to YNNPACK. On a processor with AVX2 and without AVX-512 its products
are slower than Eigen's, and each is built when it first runs: without them a training step takes 0.59 to 0.99 of the
time, generation of 8 rows 0.88, and the first step ends up to 0.4 s earlier. Without its sums, compilation takes
longer. Where a processor has AVX-512 nothing was measured, and XLA decides.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path

OPTION = "xla_cpu_experimental_ynn_fusion_type"
CPUINFO = Path("/proc/cpuinfo")


@functools.cache
def has_eigen_multiply(cpuinfo: str | Path = CPUINFO) -> bool:
    """Whether Eigen multiplies faster than YNNPACK here; False where the system does not say what the processor has."""
    try:
        lines = Path(cpuinfo).read_text().splitlines()
    except OSError:
        return False
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    return "avx2" in flags and "avx512f" not in flags


def options() -> Mapping[str, str]:
    """The compiler's options for one CPU device. What `XLA_FLAGS` say of YNNPACK stands."""
    if OPTION in os.environ.get("XLA_FLAGS", "") or not has_eigen_multiply():
        return {}
    return {OPTION: "LIBRARY_FUSION_TYPE_REDUCE"}
