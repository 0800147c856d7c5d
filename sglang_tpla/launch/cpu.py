"""What a server on a CPU needs in its environment to be served by stock SGLang's own code paths.

Answers to ``sglang/srt/utils/numa_utils.py`` (cores named for each rank) and to
``sglang/srt/distributed/device_communicators/pynccl.py`` (a communicator that must not be built).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

PLATFORM = "sglang_tpla_cpu"


def cores_per_rank(cores: Sequence[int], ranks: int) -> list[list[int]]:
    """Deal a machine's cores to the ranks, in runs of neighbours; with fewer cores than ranks, cores repeat.

    >>> cores_per_rank([0, 1, 2, 3], 2)
    [[0, 1], [2, 3]]
    >>> cores_per_rank([0, 1], 4)
    [[0], [1], [0], [1]]
    """
    share = max(1, len(cores) // ranks)
    return [[cores[(rank * share + i) % len(cores)] for i in range(share)] for rank in range(ranks)]


def environment(tp_size: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Variables of a server with `tp_size` ranks on this machine's cores.

    Cores, thread counts and compilation that the user named already are kept; the rest has only one value that works.
    """
    deal = cores_per_rank(sorted(os.sched_getaffinity(0)), tp_size)
    chosen = {
        # One group for each rank: without it SGLang wants a NUMA node for each.
        "SGLANG_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, cores)) for cores in deal),
        # The servers of one machine share its cores, and threads that wait for each other at every small
        # operation then cost more than they bring (measured: 64 tokens in 0.7 s with one, 13 s with two).
        "OMP_NUM_THREADS": "1",
        # SGLang compiles small functions when the first request needs them: half a minute on a busy CPU, in which
        # prefill gives up the first request of a server that speculates.
        "TORCHDYNAMO_DISABLE": "1",
    }
    fixed = {
        "SGLANG_PLATFORM": PLATFORM,
        # SGLang would build a NCCL communicator for a CPU device and fail; it goes without where none loads.
        "SGLANG_NCCL_SO_PATH": "no-nccl-on-a-cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return fixed | {name: value for name, value in chosen.items() if name not in environ}
