"""Bounds on the state that one prefill rank holds for its decode ranks: a rank beyond them is refused or given up."""

import contextlib

import pytest
import zmq

from sglang_tpla.transfer import messages
from sglang_tpla.transfer.network import control_socket
from sglang_tpla.transfer.prefill import peers, projections
from tests.wire import rig
from tests.wire.fakes import FakeDecode, hello


def test_more_decode_ranks_than_one_prefill_rank_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "MAX_PEERS", 1)
    with contextlib.closing(rig.prefill_rank().agent) as agent, contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(contextlib.closing(FakeDecode(agent.address[1]))) for _ in range(2))
        first.register(agent="first")
        second.say(hello(agent="second"))
        assert "serves at most 1; close unused decode servers" in second.expect(messages.Refused)[0].reason
        first.say(hello(agent="first"))  # a registered rank may greet again on its connection
        first.expect(messages.Welcome)
        first.say(messages.Goodbye("over"))
        rig.wait(lambda: agent.stats().peers == 0, "the first one's leave")
        second.register(agent="second")


def test_more_projections_than_one_prefill_rank_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only projections of registered ranks count; those of ranks that have left make room."""
    monkeypatch.setattr(projections, "MAX_PROJECTIONS", 1)

    def begin(fake: FakeDecode, group: int) -> None:
        z = rig.projection(group)
        layout = messages.CacheLayout(
            0, rig.LATENT, rig.ROPE, "bfloat16", rig.PAGE, z.widths, tuple(z.shared), rig.ITEM_BYTES
        )
        fake.register(layout=layout, projection=z.content_hash, agent=str(group))
        for index, data in enumerate(z.layer_bytes):
            fake.say(messages.ProjectionLayer(z.content_hash, index, messages.checksum(data)), data)

    with contextlib.closing(rig.prefill_rank().agent) as agent, contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(contextlib.closing(FakeDecode(agent.address[1]))) for _ in range(2))
        begin(first, 0)
        first.expect(messages.Registered)
        begin(second, 1)
        assert "keeps at most 1 projections" in second.expect(messages.Refused)[0].reason
        first.say(messages.Goodbye("over"))
        rig.wait(lambda: agent.stats().peers == 0, "the first one's leave")
        begin(second, 1)
        second.expect(messages.Registered)


def test_a_decode_rank_that_asks_and_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_socket, "QUEUE_FRAMES", 4)
    monkeypatch.setattr(control_socket, "SOCKET_BUFFER_BYTES", 4096)
    with (
        contextlib.closing(rig.prefill_rank(peer_timeout_s=60.0).agent) as agent,
        contextlib.closing(FakeDecode(agent.address[1], reads_little=True)) as fake,
    ):
        fake.register()
        ping = messages.encode(messages.Ping(1))

        def asked() -> bool:
            with contextlib.suppress(zmq.Again):
                fake.socket.send(ping, zmq.NOBLOCK)
            return agent.stats().peers_lost == 1

        rig.wait(asked, "the end of its connection")
        assert agent.stats().peers == 0
        assert agent.stats().internal_errors == 0
