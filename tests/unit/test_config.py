"""The division of ranks into groups and head shards, and settings through the environment."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_tpla.config import OTHER_VARIABLES, ConfigError, Layout, Settings, slice_width
from sglang_tpla.transfer.network.security import Security
from sglang_tpla.transfer.room import TransferError


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_every_head_meets_every_group_once(groups: int) -> None:
    layout = Layout(tp_size=8, groups=groups, heads=128)
    seen = {
        (head, layout.group_of(rank))
        for rank in range(8)
        for head in range(
            layout.head_shard_of(rank) * layout.local_heads, (layout.head_shard_of(rank) + 1) * layout.local_heads
        )
    }
    assert seen == {(head, group) for head in range(128) for group in range(groups)}
    assert layout.local_heads * 8 == 128 * groups  # so nothing is computed twice


@pytest.mark.parametrize(
    ("tp_size", "groups", "heads", "word"),
    [(4, 3, 128, "--tpla-groups"), (8, 2, 6, "head shards"), (0, 1, 8, "at least 1"), (2, 0, 8, "at least 1")],
)
def test_layouts_that_cannot_work(tp_size: int, groups: int, heads: int, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        Layout(tp_size, groups, heads)


@given(st.integers(1, 1024), st.integers(1, 16), st.data())
def test_slices_cover_the_latent(latent: int, groups: int, data: st.DataObject) -> None:
    shared = data.draw(st.integers(0, latent))
    width = slice_width(latent, groups, shared)
    assert shared + groups * (width - shared) >= latent
    assert (width <= latent and groups * (width - shared - 1) < latent - shared) or width == shared


def test_documented_widths() -> None:
    assert [slice_width(512, g, r) for g, r in ((2, 0), (4, 0), (4, 128), (8, 0), (8, 64))] == [256, 128, 224, 64, 120]


@pytest.mark.parametrize(
    ("advertise", "rank", "expected"),
    [
        (None, 1, ("10.0.0.1", 5001)),
        ("nat.example", 1, ("nat.example", 5001)),
        ("nat.example:7000", 3, ("nat.example", 7006)),
        ("[fd00::1]:7000", 1, ("fd00::1", 7002)),
        ("[fd00::1]", 1, ("fd00::1", 5001)),
        ("fd00::1", 1, ("fd00::1", 5001)),
    ],
)
def test_advertised_address(advertise: str | None, rank: int, expected: tuple[str, int]) -> None:
    settings = Settings("prefill", listen_port=5000, advertise=advertise)
    assert settings.advertised(rank, ("10.0.0.1", 5001)) == expected


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"advertise": ":70"}, "must be HOST or HOST:PORT"),
        ({"advertise": "host:port"}, "must be HOST or HOST:PORT"),
        ({"advertise": "host:\N{SUPERSCRIPT TWO}"}, "must be HOST or HOST:PORT"),
        ({"advertise": "host:70000"}, "must be HOST or HOST:PORT"),
        ({"advertise": "http://host:70"}, "must be HOST or HOST:PORT"),
        ({"advertise": "a host"}, "must be HOST or HOST:PORT"),
        ({"room_timeout_s": math.inf}, "--tpla-room-timeout-s must be positive and finite"),
        ({"heartbeat_s": math.nan}, "--tpla-heartbeat-s must be positive and finite"),
        ({"listen_port": 65535}, "must lie in 0...65534"),
        ({"role": "decode", "listen_port": 5000}, "are for prefill servers"),
        ({"role": "decode", "advertise": "host"}, "are for prefill servers"),
        ({"role": "decode", "statistics_every_tokens": 100}, "are for prefill servers"),
    ],
)
def test_addresses_that_cannot_work(fields: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Settings(**{"role": "prefill", **fields})


def test_settings_survive_the_environment() -> None:
    settings = Settings("decode", groups=4, artifact="/models/a b.safetensors", peer_timeout_s=3.5)
    assert Settings.from_environment(settings.to_environment()) == settings
    assert Settings.from_environment({}) is None


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"role": "router"}, "role"),
        ({"role": "prefill", "groups": 2, "artifact": "a"}, "stock MLA"),
        ({"role": "decode", "groups": 2}, "python -m sglang_tpla.calibrate"),
        ({"role": "decode", "groups": 2, "artifact": "a", "o_proj": "gather"}, "--tpla-o-proj"),
        ({"role": "decode", "o_proj": "scatter"}, "--tpla-groups is 1"),
        ({"role": "decode", "rows": "int8"}, "--tpla-rows must be one of plain, sketched; got 'int8'"),
        ({"role": "decode", "rows": "fp8"}, "--tpla-rows fp8 asks for FP8 rows, which were retired"),
        ({"role": "prefill", "rows": "sketched"}, "nor --tpla-rows"),
        ({"role": "decode", "groups": 2, "rows": "sketched"}, "needs --tpla-artifact"),
        ({"role": "decode", "chunk_bytes": 1}, "--tpla-chunk-bytes"),
        ({"role": "decode", "peer_timeout_s": 0.5}, "--tpla-heartbeat-s"),
        ({"role": "decode", "transfer_timeout_s": float("nan")}, "--tpla-transfer-timeout-s"),
    ],
)
def test_bad_settings(values: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        Settings(**values)  # type: ignore[arg-type]


def test_unreadable_variable_is_named() -> None:
    with pytest.raises(ConfigError, match=r"SGLANG_TPLA_CHUNK_BYTES.*'4MB'"):
        Settings.from_environment({"SGLANG_TPLA_ROLE": "decode", "SGLANG_TPLA_CHUNK_BYTES": "4MB"})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("SGLANG_TPLA_GRUOPS", "; did you mean SGLANG_TPLA_GROUPS?"),
        ("SGLANG_TPLA_ROEL", "; did you mean SGLANG_TPLA_ROLE?"),
        ("SGLANG_TPLA_CPU_MEMORY", "; did you mean SGLANG_TPLA_CPU_MEMORY_BYTES?"),
        ("SGLANG_TPLA_groups", "."),
        ("SGLANG_TPLA_XYZ", "."),
    ],
)
def test_a_variable_that_nothing_reads_is_refused(name: str, said: str) -> None:
    """This holds in a process that would be stock SGLang, too: the role's variable itself may be mistyped."""
    for others in ({}, {"SGLANG_TPLA_ROLE": "prefill"}):
        words = rf"^environment: there is no {name}{re.escape(said)} Unset it, or take one of .*$"
        with pytest.raises(ConfigError, match=words):
            Settings.from_environment({**others, name: "1"})
    with pytest.raises(TransferError, match=f"there is no {name}"):
        Security.from_environment("decode", {name: "1"})


def test_variables_of_others_pass() -> None:
    own = {"SGLANG_TPLA_TEST_TINY": "x", "SGLANG_TPLA_BENCH_LOCK": "y", "SGLANG_TP": "z"}
    assert Settings.from_environment(own | dict.fromkeys(OTHER_VARIABLES, "1")) is None
