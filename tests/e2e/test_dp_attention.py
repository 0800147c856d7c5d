"""Data-parallel attention on a decode server: TPLA within each attention group, the experts over all ranks."""

from __future__ import annotations

import contextlib
import importlib.metadata
from pathlib import Path

from sglang_tpla.artifact.artifact import Artifact
from tests.e2e.servers import Pair, launcher
from tests.e2e.test_tpla_parity import assert_answers_follow_the_formula
from tests.ports import free_ports

LATER = importlib.metadata.version("sglang") == "0.5.23"  # where one flag replaces the pair


def test_two_attention_groups_of_two_latent_groups(nano_mla: str, nano_artifact: str, tmp_path: Path) -> None:
    """T = 4, dp = 2, g = 2: each attention group holds both slices, and requests are dealt out to both."""
    flags = ("--attn-dp-size", "2") if LATER else ("--dp-size", "2", "--enable-dp-attention")
    ports = free_ports(3)
    prefill = launcher(
        "prefill",
        nano_mla,
        ports[0],
        tmp_path / "prefill.log",
        "--disaggregation-bootstrap-port",
        str(ports[1]),
    )
    decode = launcher(
        "decode", nano_mla, ports[2], tmp_path / "decode.log", "--tp", "4", *flags, "--tpla-groups", "2",
        "--tpla-artifact", nano_artifact,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        for server in (prefill, decode):
            stack.callback(server.stop)
            server.start()
        for server in (prefill, decode):
            server.wait()
        info = decode.get("/server_info")
        assert (info["tpla"]["groups"], info["tpla"]["head_shards"]) == (2, 1)
        assert len(info["internal_states"]) == 2
        assert_answers_follow_the_formula(
            Pair(prefill, ports[1], decode), Artifact.load(nano_artifact), nano_mla
        )
        states = decode.get("/server_info")["internal_states"]
        moved = [state["tpla_transfer"][0]["rooms_succeeded"] for state in states]
        assert all(moved), f"every request went to one attention group: {moved}"
