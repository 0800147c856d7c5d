"""Data-parallel attention: TPLA within each attention group of a decode server, real servers on a CPU.

Four ranks in two attention groups of two; each group keeps both latent slices of its own requests and no other's. A
prefill server may have attention groups too, each of which holds the rows of its own requests.
"""

import concurrent.futures
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_tpla.artifact.artifact import Artifact
from sglang_tpla.host import ledger
from tests.e2e.prompts import short_prompts
from tests.e2e.servers import Server, launcher, router, running, wait_idle
from tests.e2e.test_tpla_parity import assert_answers_follow_the_formula
from tests.e2e.traffic import Pair

pytestmark = pytest.mark.skipif(
    ledger.host_version() == "0.5.17",
    reason="attention groups need a GPU beside this SGLang release; test_compat holds the refusal",
)
TOKENS = 12
# SGLang 0.5.23 has one flag for attention groups, and warns of the older pair.
GROUPS = ("--attn-dp-size", "2") if ledger.host_version() == "0.5.23" else ("--dp-size", "2", "--enable-dp-attention")


@pytest.fixture(scope="module")
def decode(nano_mla: str, nano_artifact: str, logs: Path) -> Iterator[Server]:
    """T = 4, two attention groups, g = 2: each rank keeps a slice of its attention group's requests."""
    server = launcher(
        "decode", nano_mla, logs / "decode-attention-groups.log", "--tp", "4", *GROUPS,
        "--tpla-groups", "2", "--tpla-artifact", nano_artifact,
    )  # fmt: skip
    with running(server):
        yield server


def test_answers_follow_the_formula_in_both_attention_groups(
    trio: Any, decode: Server, nano_mla: str, nano_artifact: str
) -> None:
    """Rooms with even and odd numbers go to one group and the other."""
    states = decode.get("/server_info")["internal_states"]
    assert [(state["tpla"]["groups"], state["tpla"]["head_shards"]) for state in states] == [(2, 1), (2, 1)]
    pair = Pair(trio.prefill, decode)
    assert_answers_follow_the_formula(pair, Artifact.load(nano_artifact), nano_mla, prompts=4, new_tokens=TOKENS)
    served = [line for line in decode.log.read_text(errors="replace").splitlines() if " transfer {" in line]
    for rank in ("DP0 TP0", "DP0 TP1", "DP1 TP2", "DP1 TP3"):
        rooms = [line for line in served if rank in line]
        assert len(rooms) == 2 and all('"success"' in line for line in rooms), served


def test_the_router_finds_the_group_of_each_request(trio: Any, decode: Server, logs: Path) -> None:
    """Concurrent requests through the router get the answers of the trio's decode server, which has one group."""
    front = router(logs / "router-attention-groups.log", trio.prefill, decode)
    prompts = short_prompts(4, seed=9)
    with running(front), concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda prompt: front.generate(prompt, 6)["text"], prompts))
    assert answers == [trio.router.generate(prompt, 6)["text"] for prompt in prompts]
    wait_idle(trio.prefill)


def test_a_prefill_server_of_two_attention_groups(
    decode: Server, nano_mla: str, nano_artifact: str, logs: Path
) -> None:
    """Requests of either prefill group reach either decode group, and each is sent by its own group's rank."""
    flags = ("--tp", "2", *GROUPS, "--chunked-prefill-size", "512")
    prefill = launcher("prefill", nano_mla, logs / "prefill-attention-groups.log", *flags)
    with running(prefill):
        pair = Pair(prefill, decode)
        assert_answers_follow_the_formula(pair, Artifact.load(nano_artifact), nano_mla, prompts=4, new_tokens=TOKENS)
        served = [line for line in prefill.log.read_text(errors="replace").splitlines() if " transfer {" in line]
        for rank in ("DP0 TP0", "DP1 TP1"):
            assert any(rank in line and '"success"' in line for line in served), served
