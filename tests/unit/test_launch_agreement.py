"""Flags that must agree between prefill, decode and router are passed in the form that each takes, or are refused."""

import socket
from pathlib import Path

import pytest

from sglang_tpla.config import ConfigError
from sglang_tpla.launch import options as launch_options
from sglang_tpla.launch.__main__ import main
from sglang_tpla.launch.roles import Process, check_model_path, plan

ROOT = Path(__file__).resolve().parents[2]
ALL = ("--role", "all", "--model-path", "examples/nano-mla")


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def planned(*tokens: str) -> list[Process]:
    return plan(launch_options.read(tokens, {}))


def value(process: Process, flag: str) -> str | None:
    command = list(process.command)
    return command[command.index(flag) + 1] if flag in command else None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--port", "0"), "--port must lie in 1...65531"),
        (("--port", "65533"), "--port must lie in 1...65531"),
        (("--decode.port", "0"), r"decode: --port must lie in 1\.\.\.65535"),
        (("--decode.port", "30001"), "prefill server and the decode server would both listen on port 30001"),
        (("--router.prometheus-port", "30003"), "both listen on port 30003"),
        (("--prefill.page-size", "64"), "--page-size must be the same .* got 64 and nothing"),
        (("--prefill.chat-template", "a", "--decode.chat-template=b"), "got a and b"),
        (("--prefill.api-key", "hidden"), r"--api-key must be the same .*got two"),
        (("--api-key", "k", "--router.api-key", "other"), "must be the servers' --api-key"),
        (("--ssl-certfile", "x.pem"), "does not go with --role all"),
        (("--prefill.tpla-insecure", "1"), "--tpla-insecure must be the same"),
        (("--decode.tool-call-parser", "kimi_k2"), "--tool-call-parser must be the same .* nothing and kimi_k2"),
        (("--decode.sampling-defaults", "openai"), "--sampling-defaults must be the same"),
        (("--host", "127.0.0.1:3000"), "router: --host must be a host name or an IP address, without a port"),
        (("--host", "http://127.0.0.1"), "router: --host must be a host name or an IP address"),
        (("--host", ""), "router: --host must be a host name or an IP address"),
        (("--router.prometheus-host", "*"), "router: --prometheus-host must be a host name or an IP address"),
        (("--host", "no-such-host.invalid"), "router: --host must be an address of this machine"),
        (("--decode.host", "[127.0.0.1:3000]"), "decode: --host must be a host name or an IP address"),
    ],
)
def test_what_cannot_work_is_refused(flags: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        planned(*ALL, *flags)
    assert "hidden" not in str(error.value)


def test_the_router_knows_the_servers_key() -> None:
    prefill, decode, router = planned(*ALL, "--api-key", "k")
    assert [value(p, "--api-key") for p in (prefill, decode, router)] == ["k"] * 3
    assert [value(p, "--api-key") for p in planned(*ALL)] == [None] * 3


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_ipv6_addresses_in_the_form_that_each_takes(host: str) -> None:
    *_, router = planned(*ALL, "--host", host)
    assert value(router, "--host") == "[::1]" and router.url == "http://[::1]:30000"
    prefill, _, router = planned(*ALL, "--prefill.host", host)
    assert value(prefill, "--host") == "::1" and value(router, "--prefill") == "http://[::1]:30001"
    (router,) = planned(
        "--role", "router", "--host", host, "--prefill", "http://[::1]:1", "2", "--decode", "http://a:3"
    )
    assert value(router, "--host") == "[::1]"


@pytest.mark.parametrize(
    ("host", "form"),
    [("localhost", "127.0.0.1"), ("LOCALHOST", "127.0.0.1"), ("::1%lo", "[::1%1]"), ("0.0.0.0", "0.0.0.0")],
)
def test_the_router_listens_on_addresses_alone(host: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The router's own parser takes neither names nor the names of zones."""
    known = {
        "localhost": [(socket.AF_INET6, ("::1", 0, 0, 0)), (socket.AF_INET, ("127.0.0.1", 0))],
        "::1%lo": [(socket.AF_INET6, ("::1%lo", 0, 0, 1))],
        "0.0.0.0": [(socket.AF_INET, ("0.0.0.0", 0))],
    }

    def resolve(name: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        return [(family, None, None, "", address) for family, address in known[name.lower()]]

    monkeypatch.setattr("socket.getaddrinfo", resolve)
    *_, router = planned(*ALL, "--host", host)
    assert value(router, "--host") == form


@pytest.mark.parametrize("url", ["http://::1:30001", "prefill", "http://a:0", "http://a:b", "http://[::1", ""])
def test_an_address_that_is_no_url(url: str) -> None:
    with pytest.raises(ConfigError, match="--decode must be the URL of a server"):
        planned("--role", "router", "--prefill", "http://a:1", "2", f"--decode={url}")


def test_a_server_alone() -> None:
    with pytest.raises(ConfigError, match=r"prefill: --disaggregation-bootstrap-port must lie in 1\.\.\.65535; got 0"):
        planned("--role", "prefill", "--model-path", "examples/nano-mla", "--disaggregation-bootstrap-port", "0")


@pytest.mark.parametrize("flags", [("--port", "8998"), ("--port", "30000", "--disaggregation-bootstrap-port", "30000")])
def test_a_prefill_server_and_its_bootstrap_server_on_one_port(flags: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="the prefill server and its bootstrap server would both listen"):
        planned("--role", "prefill", "--model-path", "examples/nano-mla", *flags)


@pytest.mark.parametrize("port", ["0", "70000", "x", "-1", "1_0", ""])
def test_the_router_is_told_a_bootstrap_port_that_can_be(port: str) -> None:
    with pytest.raises(ConfigError, match=f"bootstrap port from 1 to 65535.*; got {port}"):
        planned("--role", "router", "--prefill", "http://a:1", port, "--decode", "http://a:3")


def test_the_router_takes_none_for_a_bootstrap_port() -> None:
    (router,) = planned("--role", "router", "--prefill", "http://a:1", "None", "--decode", "http://a:3")
    assert value(router, "--prefill") == "http://a:1"


@pytest.mark.parametrize("flag", ["prefill", "decode"])
def test_the_router_drops_no_second_server_of_one_flag(flag: str) -> None:
    servers = {"prefill": ["http://a:1", "2"], "decode": ["http://a:3"]}
    servers[flag] += ["http://b:4", "5"]
    with pytest.raises(ConfigError, match=f"--{flag} must be URL.*, once for every {flag} server; got http://a:"):
        planned("--role", "router", "--prefill", *servers["prefill"], "--decode", *servers["decode"])


def test_a_model_that_is_nowhere(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    nowhere = [
        (str(tmp_path / "none"), "a path where nothing is"),
        (str(tmp_path / "file"), "a file"),
        ("a/b/c", "a path"),
    ]
    for path, got in nowhere:
        for role in ("prefill", "all"):
            with pytest.raises(ConfigError, match=f"prefill: --model-path {path}: expected the folder .*; got {got}"):
                check_model_path(planned("--role", role, "--model-path", path)[0])
    for path in ("examples/nano-mla", "deepseek-ai/DeepSeek-V3-0324", "gpt2", "s3://bucket/a/model"):
        for process in planned("--role", "all", "--model-path", path):
            check_model_path(process)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (("--tpla-listen-port", "30000"), "the prefill server and the transfers of prefill rank 0 would both"),
        (("--tpla-listen-port", "8995", "--tp", "2"), "bootstrap server and the data channels of prefill rank 1 would"),
        (("--tpla-listen-port", "29990", "--tp", "2", "--dp", "4"), "server and the transfers of prefill rank 5 would"),
        (("--tpla-listen-port", "65534", "--tp", "2"), "--tpla-listen-port 65534: 2 ranks take the ports up to 65537"),
        (("--tpla-advertise", "a:65530", "--tp", "4"), "--tpla-advertise must be HOST or HOST:PORT"),
    ],
)
def test_transfers_have_ports_of_their_own(tokens: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned("--role", "prefill", "--model-path", "examples/nano-mla", *tokens)


@pytest.mark.parametrize("flags", [("--attn-dp-size", "3"), ("--dp", "3", "--enable-dp-attention")])
def test_attention_groups_divide_the_ranks(flags: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"dp-size must divide --tp-size 2; got 3"):
        planned("--role", "decode", "--model-path", "examples/nano-mla", "--tp", "2", *flags)


def test_transfers_keep_off_the_other_servers() -> None:
    for port in ("29997", "30001"):
        with pytest.raises(ConfigError, match=r"(transfers|data channels) of prefill rank [01]"):
            planned(*ALL, "--prefill.tpla-listen-port", port, "--prefill.tp-size", "2")
    planned(*ALL, "--prefill.tpla-listen-port", "30005", "--prefill.tp-size", "2", "--tpla-advertise", "a:65532")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["--role", "boss"], "argument --role: invalid choice: 'boss'"),
        (["--role", "all", "--config"], "argument --config: expected one argument"),
        (["--role", "all", "--dry-run", "now"], "unrecognized arguments: now"),
        (["--role", "all", "--startup-timeout-s", "soon"], "argument --startup-timeout-s: invalid float value: 'soon'"),
    ],
)
def test_a_mistake_is_one_line(tokens: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tokens) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sglang_tpla.launch: error: {message}")
