"""A rank in a separate process, to be stopped and killed: ``python -m tests.wire.child ROLE PORT``.

The process prints ``ready PORT`` and then obeys one command per line: ``ask ROOM``, ``open ROOM``, ``send ROOM
last|part``, ``state ROOM``. It answers each command with one line.
"""

import sys

import torch

from tests.wire import rig


def main(role: str, port: int) -> None:
    """Serve commands from standard input until it ends."""
    torch.set_num_threads(1)
    if role == "prefill":
        item: rig.PrefillRank | rig.DecodeRank = rig.prefill_rank(port=port)
        print("ready", item.agent.address[1], flush=True)
    else:
        item = rig.decode_rank(rank=1, size=2)
        print("ready", port, flush=True)
    for line in sys.stdin:
        command, room, *rest = line.split()
        number = int(room)
        if command == "ask":
            rig.ask(item, [("127.0.0.1", port, False)], number, rig.pages(1, 60))
        elif command == "open":
            item.agent.open_room(number)
        elif command == "send":
            last = rest == ["last"]
            item.agent.send(number, rig.pages(2, 60), last=last, metadata_row=0 if last else None)
        print(item.agent.poll(number).name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
