"""The environment in which stock SGLang's own code paths serve on a CPU.

The variables follow ``sglang/srt/utils/numa_utils.py`` (each rank's cores) and
``sglang/srt/distributed/device_communicators/pynccl.py`` (which must build no communicator).
"""

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
    """Return the variables of a server with `tp_size` ranks on this machine's cores.

    The user's own values for cores, threads and compilation stay; the other variables have only one value that works.
    """
    deal = cores_per_rank(sorted(os.sched_getaffinity(0)), tp_size)
    chosen = {
        # Without a group of cores for each rank, SGLang wants a NUMA node for each.
        "SGLANG_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, cores)) for cores in deal),
        # The servers of one machine share its cores, so threads that wait for each other at every small operation
        # cost more than they bring (measured: 64 tokens took 0.7 s with one thread and 13 s with two).
        "OMP_NUM_THREADS": "1",
        # SGLang compiles small functions when the first request needs them. On a busy CPU this takes half a minute, and
        # meanwhile prefill gives up the first request of a server that speculates.
        "TORCHDYNAMO_DISABLE": "1",
    }
    fixed = {
        "SGLANG_PLATFORM": PLATFORM,
        # SGLang would fail to build a NCCL communicator for a CPU, and does without one if the library does not load.
        "SGLANG_NCCL_SO_PATH": "no-nccl-on-a-cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return fixed | {name: value for name, value in chosen.items() if name not in environ}
