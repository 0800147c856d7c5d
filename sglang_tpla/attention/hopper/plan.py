"""The constants of a decode step's plan, which the kernel ``latent_plan`` (cuda/latent_plan.cu) makes on the GPU.

The kernel cuts the step's cache into parts, one for each persistent block, as equal as whole tiles allow. The plan
depends on the lengths alone, so equal lengths give the same merge order and the same result. `tests/gpu/plan_twin.py`
makes the same plan in Python.
"""

TILE_TOKENS = 64
SEGMENT_COST = 2  # loading a query and storing a result cost as much as this many tiles
MAX_PARTS = 256
