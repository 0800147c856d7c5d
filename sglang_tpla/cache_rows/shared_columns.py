"""The numbers r of columns shared by all groups that sketched rows hold, and the one taken when none is given.

Calibration makes rows of that r, and the planner prices them.
"""


def shared_choices(latent_dim: int, groups: int, sketch_bits: int = 4) -> list[int]:
    """Return every r that g groups of sketched rows hold, ascending; d (all columns shared) is the last."""
    return [
        shared
        for shared in range(latent_dim + 1)
        if (latent_dim - shared) % groups == 0 and (latent_dim - shared) // groups * sketch_bits % 8 == 0
    ]


def default_shared(latent_dim: int, groups: int, sketch_bits: int = 4) -> int:
    """Return r of a quiet model when none is given: a quarter of the latent but 64 at most."""
    if groups == 1:
        return latent_dim
    return nearest_shared(latent_dim, groups, min(latent_dim // 4, 64), sketch_bits)


def nearest_shared(latent_dim: int, groups: int, wanted: int, sketch_bits: int = 4) -> int:
    """Return the r nearest to the one wanted that the format holds, and at least half of it: too few cost much more.

    Whole bytes at every number of bits are preferred: blocks of a multiple of eight columns.
    """
    choices = [choice for choice in shared_choices(latent_dim, groups, sketch_bits) if 2 * choice >= wanted]
    even = [choice for choice in choices if (latent_dim - choice) // groups % 8 == 0 and choice < latent_dim]
    near = [choice for choice in even if abs(choice - wanted) <= wanted // 4] or choices
    return min(near, key=lambda choice: (abs(choice - wanted), -choice))
