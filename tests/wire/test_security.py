"""Keys: ranks with allowed keys transfer as without keys, all others are refused and counted. Plain TCP works only on
loopback.
"""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import zmq

from sglang_tpla.transfer import keys
from sglang_tpla.transfer.decode.agent import DecodeAgent
from sglang_tpla.transfer.network.security import INSECURE_VARIABLE, KEYS_VARIABLE, Security, is_loopback
from sglang_tpla.transfer.prefill.agent import PrefillAgent
from sglang_tpla.transfer.room import RoomState, TransferError
from tests.wire import rig


def fetch(prefill: rig.PrefillRank, decode: rig.DecodeRank) -> RoomState:
    """Try one transfer."""
    prefill.agent.open_room(1)
    decode.agent.open_room(1, [prefill.peer])
    rig.wait(lambda: decode.agent.poll(1) != RoomState.BOOTSTRAPPING, "registration")
    if decode.agent.poll(1) == RoomState.FAILED:
        return RoomState.FAILED
    decode.agent.request(1, rig.pages(1, 9), metadata_row=0, expected_ranks=1)
    prefill.agent.send(1, rig.pages(2, 9), last=True, metadata_row=0)
    return rig.ended(decode.agent, 1)


def test_allowed_keys_transfer(key_folder: Path) -> None:
    prefill, decode = rig.prefill_rank(), rig.decode_rank(host="far")
    with rig.serving(prefill, decode):
        assert fetch(prefill, decode) == RoomState.SUCCESS, decode.agent.failure(1)
        rig.check_rows(prefill, decode, rig.pages(2, 9), rig.pages(1, 9), 9 * rig.PAGE)


def hello_after_refusal(decode: rig.DecodeRank) -> None:
    """Let a decode rank send Hello only when its connection has ended already, as on a busy machine."""
    connections: Any = decode.agent.connections
    send = connections._send_now

    def send_late(connection: Any, message: Any, payload: bytes | None) -> None:
        if connection.socket is not None:
            rig.wait(lambda: not connection.socket.getsockopt(zmq.EVENTS) & zmq.POLLOUT, "the connection's end")
        send(connection, message, payload)

    connections._send_now = send_late


@pytest.mark.parametrize("late", [False, True], ids=["hello first", "refusal first"])
def test_other_keys_and_no_keys_are_refused(key_folder: Path, monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    prefill = rig.prefill_rank()
    with contextlib.closing(prefill.agent):
        keys.main([str(key_folder), "--decode", "stranger"])
        text = (key_folder / "stranger.secret").read_text()
        (key_folder / "decode.secret").write_text(text)  # a key made after prefill read its allow-list
        (key_folder / "decode.secret").chmod(0o600)
        stranger = rig.decode_rank()
        monkeypatch.delenv(KEYS_VARIABLE)
        bare = rig.decode_rank()
        for decode in (stranger, bare):
            if late and decode is stranger:  # without keys, ZeroMQ connects again by itself
                hello_after_refusal(decode)
            with contextlib.closing(decode.agent):
                before = prefill.agent.stats().refused
                assert fetch(prefill, decode) == RoomState.FAILED
                rig.wait(lambda before=before: prefill.agent.stats().refused > before, "the refusal to be counted")
                assert "--tpla-keys" in decode.agent.failure(1)
                prefill.agent.close_room(1)
        assert prefill.agent.stats().peers == 0


def test_decode_refuses_a_prefill_rank_with_another_key(key_folder: Path, tmp_path: Path) -> None:
    keys.main([str(tmp_path / "others")])
    decode = rig.decode_rank()
    (key_folder / "prefill.secret").unlink()
    (key_folder / "prefill.secret").write_text((tmp_path / "others" / "prefill.secret").read_text())
    (key_folder / "prefill.secret").chmod(0o600)
    prefill = rig.prefill_rank()
    with rig.serving(prefill, decode):
        assert fetch(prefill, decode) == RoomState.FAILED


def test_plain_tcp_beyond_loopback_needs_the_word(monkeypatch: pytest.MonkeyPatch) -> None:
    prefill, decode = rig.prefill_rank(), rig.decode_rank()
    fields = {"model_hash": "model", "settings": rig.SETTINGS, "rank": 0}
    with rig.serving(prefill, decode):
        with pytest.raises(TransferError, match=r"listening on 0\.0\.0\.0 without keys .* --tpla-keys"):
            PrefillAgent(prefill.pool, prefill.metadata, bind_host="0.0.0.0", **fields)
        with pytest.raises(TransferError, match=r"connecting to 192\.0\.2\.1 without keys"):
            decode.agent.connect("192.0.2.1", 1)
        monkeypatch.setenv(INSECURE_VARIABLE, "yes")  # refused, as in the settings of servers
        with pytest.raises(TransferError, match="SGLANG_TPLA_INSECURE must be 0 or 1; got 'yes'"):
            Security.from_environment("prefill")
        monkeypatch.setenv(INSECURE_VARIABLE, "1")
        open_to_all = PrefillAgent(prefill.pool, prefill.metadata, bind_host="0.0.0.0", **fields)
        open_to_all.close()
        other = DecodeAgent(decode.pool, decode.metadata, None, size=1, **fields)
        other.connect("192.0.2.1", 1)
        other.close()


def test_key_files_are_checked(key_folder: Path) -> None:
    (key_folder / "decode.secret").chmod(0o644)
    with pytest.raises(TransferError, match="can be read by others; run `chmod 600"):
        Security.from_environment("decode")
    (key_folder / "decode.secret").chmod(0o600)
    (key_folder / "prefill.public").write_text("short\n")
    with pytest.raises(TransferError, match=r"expected 40 characters \(z85\), got 5"):
        Security.from_environment("decode")
    for name, role in (("prefill.public", "decode"), ("allowed", "prefill")):
        (key_folder / name).write_bytes(b"\xff\xfe no text")
        with pytest.raises(TransferError, match=rf"expected .* in .*{name}: 'utf-8' codec"):
            Security.from_environment(role)
    (key_folder / "allowed").unlink()
    with pytest.raises(TransferError, match="expected the decode keys to serve"):
        Security.from_environment("prefill")


def test_a_key_that_was_listed_by_hand_keeps_its_line(key_folder: Path) -> None:
    """The file may lack its last end of line, and the next key must not be lost in that line."""
    allowed = key_folder / "allowed"
    allowed.write_text(allowed.read_text().rstrip("\n"))
    before = Security.from_environment("prefill").allowed
    assert keys.main([str(key_folder), "--decode", "second"]) == 0
    second = (key_folder / "second.public").read_text().split()[0].encode()
    assert Security.from_environment("prefill").allowed == before | {second}


def test_a_folder_that_cannot_take_keys_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A server's own folder has half of a pair. New keys would cut the server off from its peers."""
    (tmp_path / "file").touch()
    for halves in (("prefill.public", "decode.secret"), ("decode.secret",)):
        folder = tmp_path / "-".join(halves)
        assert keys.main([str(folder)]) == 0
        kept = {half: (folder / half).read_bytes() for half in halves}
        for file in folder.iterdir():
            if file.name not in halves:
                file.unlink()
        assert keys.main([str(folder)]) == 2
        assert {half: (folder / half).read_bytes() for half in halves} == kept
        assert "found none: make keys where both halves are\n" in capsys.readouterr().err
    (tmp_path / "whole").mkdir()
    assert keys.main([str(tmp_path / "whole")]) == 0
    (tmp_path / "whole" / "decode.public").write_text("\n")
    for folder, said in (("file", "File exists"), ("file/inside", "Not a directory"), ("whole", "40 characters")):
        capsys.readouterr()
        assert keys.main([str(tmp_path / folder)]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["prefill", "allowed", "../x", "a/b", "", "."])
def test_names_of_decode_servers_become_files(name: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        keys.main([str(tmp_path / "keys"), "--decode", name])
    assert not (tmp_path / "keys").exists()


@pytest.mark.parametrize(
    ("host", "stays"),
    [("127.0.0.1", True), ("::1", True), ("::ffff:127.0.0.1", True), ("::ffff:10.0.0.1", False), ("10.0.0.1", False),
     ("localhost", True), ("here", False)],
)  # fmt: skip
def test_which_addresses_need_no_keys(host: str, stays: bool) -> None:
    assert is_loopback(host) is stays
