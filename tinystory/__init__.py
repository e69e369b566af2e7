"""tinystory: a small language model learns to tell stories by interacting with a teacher."""

import os

# Read by GNU OpenMP when torch is imported, so this package comes first. By default its threads
# spin for milliseconds while they wait for one another: beside other programs they keep the core
# from the thread that they wait for.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__version__ = "0.1.0"
