"""Count the values of a token and layer that are sent for all ranks of one host; nothing is timed."""

import contextlib
import threading

import numpy as np
import torch

from sglang_tpla.config import Settings
from sglang_tpla.transfer.decode.agent import DecodeAgent
from sglang_tpla.transfer.memory.pool import CachePool, MetadataRows
from sglang_tpla.transfer.memory.projection import Projection
from sglang_tpla.transfer.prefill.agent import PrefillAgent
from sglang_tpla.transfer.room import RoomState

LATENT, ROPE, PAGE = 512, 64, 64


def wire_values(ranks: int, groups: int, shared: int, host_id: str | None) -> float:
    """Return the values of a token and layer that are sent (or put into shared memory) for all ranks of one host."""
    tokens, width = 1024, shared + -(-(LATENT - shared) // groups)
    pool = CachePool([torch.randn(tokens, LATENT + ROPE).bfloat16() for _ in range(2)], LATENT, ROPE, PAGE)
    metadata = MetadataRows([np.zeros((1, 64), dtype=np.uint8)])
    settings = Settings(role="prefill", peer_timeout_s=60.0, chunk_bytes=1 << 18, staging_bytes=16 << 20)
    shared_columns = torch.randn(LATENT, shared)
    projections = [
        Projection([torch.cat((shared_columns, torch.randn(LATENT, width - shared)), 1)] * 2, [shared] * 2)
        for _ in range(groups)
    ]
    pages = np.arange(tokens // PAGE, dtype=np.int32)
    with contextlib.ExitStack() as stack:
        prefill = stack.enter_context(
            contextlib.closing(
                PrefillAgent(pool, metadata, model_hash="", settings=settings, bind_host="127.0.0.1", rank=0)
            )
        )
        prefill.open_room(1)
        agents = []
        for rank in range(ranks):
            z = projections[rank % groups] if groups > 1 else None
            rows = (width if groups > 1 else LATENT) + ROPE
            mine = CachePool([torch.zeros(tokens, rows).bfloat16() for _ in range(2)], LATENT, ROPE, PAGE)
            own = MetadataRows([np.zeros((1, 64), dtype=np.uint8)])
            agent = DecodeAgent(mine, own, z, model_hash="", settings=settings, rank=rank, size=ranks, host_id=host_id)
            agents.append(stack.enter_context(contextlib.closing(agent)))
            agent.open_room(1, [(*prefill.address, False)])
            agent.request(1, pages, metadata_row=0, expected_ranks=ranks)
        prefill.send(1, pages, last=True, metadata_row=0)
        done = threading.Event()
        while not done.wait(0.001):
            if all(agent.poll(1).ended for agent in (prefill, *agents)):
                done.set()
        assert prefill.poll(1) == RoomState.SUCCESS, prefill.failure(1)
        metric = prefill.metric(1)
        return metric.wire_bytes / (2 * 2 * tokens)
