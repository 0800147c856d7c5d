"""The launcher can plan every configuration in ``launch/``, and SGLang's own parsers accept it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sglang_tpla.launch import options as launch_options
from sglang_tpla.launch.roles import Process, plan

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "launch"
# The artifacts of real models are not in the repository; any file stands for them here.
ARTIFACT = str(ROOT / "examples" / "artifacts" / "nano-mla-g2.safetensors")
ROLES = {
    "quickstart.yaml": "all",
    "one-machine-8-gpus.yaml": "all",
    "prefill.yaml": "prefill",
    "decode.yaml": "decode",
    "router.yaml": "router",
}


def tokens_of(name: str) -> list[str]:
    role = ROLES[name]
    own = [] if role in ("prefill", "router") else ["--tpla-artifact", ARTIFACT]
    own = ["--decode.tpla-artifact", ARTIFACT] if role == "all" else own
    return ["--role", role, "--config", str(FOLDER / name), *own]


def kubernetes_commands() -> list[list[str]]:
    documents = list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()))
    containers = [
        container
        for document in documents
        if document["kind"] == "Deployment"
        for container in document["spec"]["template"]["spec"]["containers"]
    ]
    assert all(container["command"][1:] == ["-m", "sglang_tpla.launch"] for container in containers)
    return [container["args"] for container in containers]


# SGLang runs in a separate process, so that its import cannot affect other tests.
PARSE = """
import argparse, json, sys
from sglang.srt.server_args import ServerArgs
from sglang_router.router_args import RouterArgs
server, router = argparse.ArgumentParser(), argparse.ArgumentParser()
ServerArgs.add_cli_args(server)
for action in server._actions:
    if action.dest == "disaggregation_transfer_backend" and "tpla" not in action.choices:
        action.choices = [*action.choices, "tpla"]  # what the plug-in adds
RouterArgs.add_cli_args(router, use_router_prefix=False)
parsers = {"router": router}
for role, tokens in json.load(sys.stdin):
    print(json.dumps(vars(parsers.get(role, server).parse_args(tokens)), default=str))
"""


def planned(name: str) -> list[Process]:
    return plan(launch_options.read(tokens_of(name), {}))


@pytest.fixture(scope="module")
def parsed() -> dict[str, list[dict[str, Any]]]:
    """Map each file to SGLang's reading of each process's command line."""
    plans = {name: planned(name) for name in ROLES}
    for command in kubernetes_commands():
        own = ["--tpla-artifact", ARTIFACT] if command[0] == "--role=decode" else []
        plans.setdefault("kubernetes.yaml", []).extend(plan(launch_options.read([*command, *own], {})))
    asked = [(process.role, process.command[3:]) for processes in plans.values() for process in processes]
    done = subprocess.run(
        [sys.executable, "-c", PARSE], input=json.dumps(asked), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers = iter(done.stdout.splitlines())
    return {name: [json.loads(next(answers)) for _ in processes] for name, processes in plans.items()}


def test_every_file_is_listed() -> None:
    assert {path.name for path in FOLDER.glob("*.yaml")} == {*ROLES, "kubernetes.yaml"}


def test_sglang_takes_every_flag(parsed: dict[str, list[dict[str, Any]]]) -> None:
    for name, role in {**ROLES, "kubernetes.yaml": "all"}.items():
        roles = ("prefill", "decode", "router") if role == "all" else (role,)
        for one, flags in zip(roles, parsed[name], strict=True):
            if one == "router":
                assert flags["pd_disaggregation"] is True
            else:
                assert (flags["disaggregation_mode"], flags["disaggregation_transfer_backend"]) == (one, "tpla")


def test_the_router_knows_both_prefill_machines(parsed: dict[str, list[dict[str, Any]]]) -> None:
    (router,) = parsed["router.yaml"]
    assert router["prefill"] == [["http://10.0.0.11:30000", "8998"], ["http://10.0.0.12:30000", "8998"]]
    assert router["decode"] == [["http://10.0.0.21:30000"]]


def test_prefill_and_decode_of_one_machine_share_no_gpu(parsed: dict[str, list[dict[str, Any]]]) -> None:
    prefill, decode, _ = parsed["one-machine-8-gpus.yaml"]
    first, second = (set(range(a["base_gpu_id"], a["base_gpu_id"] + a["tp_size"])) for a in (prefill, decode))
    assert first | second == set(range(8))
    assert not first & second


def test_the_router_in_kubernetes_finds_its_servers_by_label(parsed: dict[str, list[dict[str, Any]]]) -> None:
    router = parsed["kubernetes.yaml"][2]
    assert (router["prefill_selector"], router["decode_selector"]) == (["app=tpla-prefill"], ["app=tpla-decode"])
    assert router["service_discovery"] is True
