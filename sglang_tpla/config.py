"""Who holds what: tensor-parallel rank -> latent group, head shard, widths.

Notation of the design (TPLA, arXiv 2508.15881): T attention ranks, g latent groups, T/g head shards.
Rank t belongs to group ``t % g`` and head shard ``t // g``; it computes ``H * g / T`` heads on its
group's slice of the latent. The replicated rotary key travels beside every slice.
"""

from __future__ import annotations

from dataclasses import dataclass


class ConfigError(ValueError):
    """A setting that cannot work, said once: what was expected, what came, where, what to do."""


@dataclass(frozen=True)
class Layout:
    """How T attention tensor-parallel ranks share the latent and the query heads.

    Args:
        tp_size: T, attention tensor-parallel ranks.
        groups: g, latent groups; divides T.
        heads: H, query heads of the whole model; T/g divides H.

    Raises:
        ConfigError: g does not divide T, or T/g does not divide H.
    """

    tp_size: int
    groups: int
    heads: int

    def __post_init__(self) -> None:
        if self.tp_size < 1 or self.groups < 1:
            raise ConfigError(
                f"--tpla-groups and --tp-size must be at least 1; "
                f"got groups={self.groups}, tp_size={self.tp_size}"
            )
        if self.tp_size % self.groups:
            raise ConfigError(
                f"--tpla-groups must divide the attention tensor-parallel size: got "
                f"groups={self.groups} with tp_size={self.tp_size}; use one of "
                f"{[g for g in range(1, self.tp_size + 1) if self.tp_size % g == 0]}"
            )
        if self.heads % self.head_shards:
            raise ConfigError(
                f"the model's {self.heads} query heads cannot be split over {self.head_shards} head "
                f"shards (tp_size={self.tp_size} / groups={self.groups}); choose groups so that "
                f"tp_size/groups divides {self.heads}"
            )

    @property
    def head_shards(self) -> int:
        """Number of head shards, T/g."""
        return self.tp_size // self.groups

    @property
    def local_heads(self) -> int:
        """Query heads one rank computes, H*g/T."""
        return self.heads // self.head_shards

    def group_of(self, rank: int) -> int:
        """Latent group of a rank."""
        return rank % self.groups

    def head_shard_of(self, rank: int) -> int:
        """Head shard of a rank."""
        return rank // self.groups


def slice_width(latent_dim: int, groups: int, shared_dims: int) -> int:
    """Latent values one rank keeps a token and layer: w = r + ceil((d - r) / g)."""
    return shared_dims + -(-(latent_dim - shared_dims) // groups)
