"""Sum the groups' head outputs before ``o_proj``, which is then not held g times (``--tpla-o-proj scatter``).

The g ranks of a head shard compute the same heads on different slices. One reduce-scatter among them adds their
outputs and leaves rank t the heads that plain tensor parallelism would give it (H t/T to H (t+1)/T): ranks t = g s + i
of shard s are neighbours, and part i of the shard's heads is the t-th part of all. The all-reduce after ``o_proj``
stays. The sum costs one collective a layer, and saves holding and reading g - 1 parts of ``o_proj``.
"""

from functools import cache
from typing import Any

import torch
from sglang.srt.distributed.parallel_state import get_world_group, init_model_parallel_group


@cache
def head_shard_ranks(groups: int) -> Any:
    """Return the ranks that hold this rank's heads; every rank of the server must call this when it builds layers."""
    world = get_world_group()
    size = torch.distributed.get_world_size()
    return init_model_parallel_group(
        [list(range(first, first + groups)) for first in range(0, size, groups)],
        world.local_rank,
        torch.distributed.get_backend(world.device_group),
        use_custom_allreduce=False,
        group_name="tpla_head_shard",
    )


def sum_over_groups(values: torch.Tensor, groups: int) -> torch.Tensor:
    """Sum the heads' outputs over the groups, and keep this rank's part: [h, tokens, v] -> [h / g, tokens, v]."""
    summed = values.new_empty(values.shape[0] // groups, *values.shape[1:])
    ranks = head_shard_ranks(groups)
    if values.is_cuda:
        ranks.reduce_scatter_tensor(summed, values)
    else:  # SGLang registers its operator only for GPUs
        torch.distributed.reduce_scatter_tensor(summed, values, group=ranks.device_group)
    return summed
