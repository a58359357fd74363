"""Where the time and the memory of a step go: measured, traced, read from its compiled program, and drawn as a page.

with artifex.profile(step) as prof:
    for batch in batches:
        state, metrics = prof.step(state, batch)
print(prof.summary())
prof.save("profiles/mine")
"""

from artifex.profiling.profiler import Profiler, profile
from artifex.profiling.result import Profile

__all__ = ["Profile", "Profiler", "profile"]
