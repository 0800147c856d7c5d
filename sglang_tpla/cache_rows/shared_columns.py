"""The numbers r of shared columns that sketched rows can hold, and the default.

Calibration makes rows of the default r, and the planner prices them.
"""


def shared_choices(latent_dim: int, groups: int, sketch_bits: int = 4) -> list[int]:
    """Return every r that sketched rows of g groups can hold, ascending; d (all columns shared) is the last."""
    return [
        shared
        for shared in range(latent_dim + 1)
        if (latent_dim - shared) % groups == 0 and (latent_dim - shared) // groups * sketch_bits % 8 == 0
    ]


def default_shared(latent_dim: int, groups: int, sketch_bits: int = 4) -> int:
    """Return the default r of a model whose sketch adds little noise: a quarter of the latent, but 64 at most."""
    if groups == 1:
        return latent_dim
    return nearest_shared(latent_dim, groups, min(latent_dim // 4, 64), sketch_bits)


def nearest_shared(latent_dim: int, groups: int, wanted: int, sketch_bits: int = 4) -> int:
    """Return the r nearest to ``wanted`` that the format can hold.

    The result is at least half of ``wanted``, because too few shared columns cost much more than too many. Blocks of a
    multiple of eight columns are preferred: they fill whole bytes at every number of bits.
    """
    choices = [choice for choice in shared_choices(latent_dim, groups, sketch_bits) if 2 * choice >= wanted]
    even = [choice for choice in choices if (latent_dim - choice) // groups % 8 == 0 and choice < latent_dim]
    near = [choice for choice in even if abs(choice - wanted) <= wanted // 4] or choices
    return min(near, key=lambda choice: (abs(choice - wanted), -choice))
