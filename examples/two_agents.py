"""Move a latent cache between two processes with the transfer agents alone; SGLang is not needed.

    python examples/two_agents.py [--groups 2] [--tokens 4096]

The parent process is a prefill rank with a pool of whole latents. Each child is a decode rank with a pool of slices; it
hands over its projection when it registers, asks for one room, and compares every row that arrived with the formula
``z = c Z``. What SGLang's scheduler would do is done here by hand: choosing pages, opening rooms, polling.
"""

import argparse
import multiprocessing
import time
from contextlib import closing
from multiprocessing.connection import Connection

import numpy as np
import torch

from sglang_tpla.config import Settings
from sglang_tpla.transfer.decode.agent import DecodeAgent
from sglang_tpla.transfer.memory.pool import CachePool, MetadataRows
from sglang_tpla.transfer.memory.projection import Projection
from sglang_tpla.transfer.prefill.agent import PrefillAgent
from sglang_tpla.transfer.room import RoomState, TransferError

LAYERS, LATENT, ROPE, PAGE_TOKENS = 4, 512, 64, 64
MODEL = "any text that both sides agree on: the hash of the checkpoint"
ROOM = 7


def rows(tokens: int, width: int) -> list[torch.Tensor]:
    """Return the layers' rows ``[tokens, width + rope]`` of a pool; all processes draw the same random values."""
    generator = torch.Generator().manual_seed(width)
    return [torch.randn(tokens, width + ROPE, generator=generator).bfloat16() for _ in range(LAYERS)]


def projection(group: int, groups: int) -> Projection:
    """Return a group's slice of the latent: its share of the columns (a calibrated artifact has better slices)."""
    width = LATENT // groups
    columns = torch.eye(LATENT)[:, group * width : (group + 1) * width]  # [d, w]
    return Projection([columns] * LAYERS, [0] * LAYERS)


def wait_for_end(agent: PrefillAgent | DecodeAgent) -> None:
    """Poll the room as a scheduler does; raise RuntimeError with the agent's reason if the room failed."""
    while not agent.poll(ROOM).ended:
        time.sleep(0.001)
    if agent.poll(ROOM) != RoomState.SUCCESS:
        raise RuntimeError(f"room {ROOM} failed: {agent.failure(ROOM)}")


def decode(group: int, groups: int, tokens: int, address: tuple[str, int], results: Connection) -> None:
    """Run a decode rank: ask for the room's rows, wait, and compare them with the formula."""
    z = projection(group, groups)
    pool = CachePool([torch.zeros_like(layer) for layer in rows(tokens, LATENT // groups)], LATENT, ROPE, PAGE_TOKENS)
    metadata = MetadataRows([np.zeros((1, 64), dtype=np.uint8)])
    settings = Settings(role="decode")
    agent = DecodeAgent(pool, metadata, z, model_hash=MODEL, settings=settings, rank=group, size=groups)
    with closing(agent):
        agent.open_room(ROOM, [(*address, False)])
        while agent.poll(ROOM) == RoomState.BOOTSTRAPPING:
            time.sleep(0.001)
        pages = np.arange(tokens // PAGE_TOKENS, dtype=np.int32)[::-1].copy()  # any pages of our pool
        start = time.monotonic()
        agent.request(ROOM, pages, metadata_row=0, expected_ranks=groups, prefix_tokens=0)
        wait_for_end(agent)
        seconds = time.monotonic() - start
    slots = torch.from_numpy(pool.slots(pages, tokens))
    for sent, received, matrix in zip(rows(tokens, LATENT), pool.layers, z.matrices, strict=True):
        torch.testing.assert_close(received[slots, : z.widths[0]], (sent[:, :LATENT].float() @ matrix).bfloat16())
        assert torch.equal(received[slots, z.widths[0] :], sent[:, LATENT:])
    results.send((sum(layer.nbytes for layer in pool.layers), seconds))


def main() -> None:
    """Run the prefill rank, and one child process for each latent group."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=2, help="latent groups, one decode rank each")
    parser.add_argument("--tokens", type=int, default=4096, help=f"a multiple of {PAGE_TOKENS}")
    options = parser.parse_args()
    if options.groups < 1 or LATENT % options.groups:
        parser.error(f"--groups must divide the latent's {LATENT} columns; got {options.groups}")
    if options.tokens < 1 or options.tokens % PAGE_TOKENS:
        parser.error(f"--tokens must be a multiple of {PAGE_TOKENS}; got {options.tokens}")
    pool = CachePool(rows(options.tokens, LATENT), LATENT, ROPE, PAGE_TOKENS)
    metadata = MetadataRows([np.zeros((1, 64), dtype=np.uint8)])
    try:  # fails if the environment names unusable keys
        agent = PrefillAgent(
            pool,
            metadata,
            model_hash=MODEL,
            settings=Settings(role="prefill", room_timeout_s=120.0),  # a child first has to import torch
            bind_host="127.0.0.1",
            rank=0,
        )
    except TransferError as error:
        parser.error(str(error))
    spawn = multiprocessing.get_context("spawn")
    with closing(agent):
        agent.open_room(ROOM)
        children = []
        for group in range(options.groups):
            results, child_end = spawn.Pipe(duplex=False)
            arguments = (group, options.groups, options.tokens, agent.address, child_end)
            children.append((spawn.Process(target=decode, args=arguments), results))
            children[-1][0].start()
            child_end.close()  # then `recv` below ends if the child dies
        pages = np.arange(options.tokens // PAGE_TOKENS, dtype=np.int32)
        agent.send(ROOM, pages, last=True, metadata_row=0)
        wait_for_end(agent)
        for group, (process, results) in enumerate(children):
            received_bytes, seconds = results.recv()
            process.join()
            print(f"group {group}: {received_bytes / 1e6:.1f} MB in {seconds * 1e3:.0f} ms, every row as it should be")


if __name__ == "__main__":
    main()
