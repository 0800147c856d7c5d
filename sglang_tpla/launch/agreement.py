"""Flags that must agree between the processes of one deployment, in the form that each of them takes.

Every check raises `ConfigError`, which names the flag and what came.
"""

import re
import socket
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from sglang_tpla.config import ConfigError, Settings, is_host, without_brackets
from sglang_tpla.launch.flags import Argument, has, integer, last, value_of

# Both servers read the prompt and both sample, so these flags must have one value.
ALIKE = (
    "revision", "tokenizer-path", "tokenizer-mode", "skip-tokenizer-init", "chat-template", "hf-chat-template-name",
    "default-chat-template-kwargs", "page-size",
    "api-key", "json-model-override-args", "preferred-sampling-params", "sampling-defaults",
    "enable-custom-logit-processor", "grammar-backend", "constrained-json-whitespace-pattern",
    "constrained-json-disable-any-whitespace", "enable-strict-thinking", "reasoning-parser", "tool-call-parser",
    "speculative-algorithm", "enable-lora", "lora-paths",
)  # fmt: skip
SECRET = ("api-key",)  # never shown
ALIKE_SETTINGS = ("keys", "insecure")
LAST_PORT = 65535
PORTS = ("port", "disaggregation-bootstrap-port", "prometheus-port")
HOSTS = ("host", "prometheus-host")


def check_ports(role: str, arguments: Sequence[Argument]) -> None:
    """Refuse ports on which no peer could find the process; 0 would become a port that nobody knows."""
    for name in PORTS:
        if has(arguments, name) and not 1 <= (port := integer(arguments, name, 0)) <= LAST_PORT:
            raise ConfigError(f"{role}: --{name} must lie in 1...{LAST_PORT}; got {port}")


def check_hosts(role: str, arguments: Sequence[Argument]) -> None:
    """Refuse hosts that are neither an IP address nor a host name, such as a name with a port."""
    for argument in arguments:
        if argument.name not in HOSTS:
            continue
        value = argument.value or ""
        if not is_host(without_brackets(value)):
            raise ConfigError(
                f"{role}: --{argument.name} must be a host name or an IP address, without a port (that is --port); "
                f"got {value!r}"
            )


def check_first_port(port: int) -> None:
    """Check the router's port, after which the servers' ports are counted."""
    if not 1 <= port <= LAST_PORT - 4:
        raise ConfigError(
            f"--port must lie in 1...{LAST_PORT - 4}: the router listens there, and prefill, decode, bootstrap server "
            f"and metrics on the four ports after it; got {port}"
        )


def check_alike(prefill: Sequence[Argument], decode: Sequence[Argument]) -> None:
    """Check the flags that must have one value on both servers."""
    for name in ALIKE:
        first, second = given(prefill, name), given(decode, name)
        if first != second:
            got = "two" if name in SECRET else f"{first or 'nothing'} and {second or 'nothing'}"
            raise ConfigError(
                f"--{name} must be the same on prefill and decode, which both read the request; got {got}: give it "
                "once, outside --prefill. and --decode."
            )


def given(arguments: Sequence[Argument], name: str) -> str | None:
    """Return a flag's values as they were written, or None."""
    found = last(arguments, name)
    return None if found is None else " ".join(found.values) or "the bare flag"


def check_settings_alike(prefill: Settings, decode: Settings) -> None:
    """Check the settings that must have one value on both servers."""
    for name in ALIKE_SETTINGS:
        first, second = getattr(prefill, name), getattr(decode, name)
        if first != second:
            raise ConfigError(
                f"--tpla-{name} must be the same on prefill and decode, which talk to each other; got {first} and "
                f"{second}"
            )


def transfer_ports(settings: Settings, prefill: Sequence[Argument]) -> dict[str, int]:
    """Return the ports of a prefill server's ranks by what they are for, where ``--tpla-listen-port`` chooses them.

    The ranks would find out when their weights are loaded.
    """
    if has(prefill, "nnodes"):  # other machines have some of the ranks
        return {}
    replicas = 1 if has(prefill, "enable-dp-attention") else integer(prefill, "dp-size", 1)
    ranks = max(1, integer(prefill, "tp-size", 1) * replicas)
    settings.advertised(ranks - 1, ("", 0))
    if not settings.listen_port:
        return {}
    if (last_port := settings.listen_port + 2 * ranks - 1) > LAST_PORT:
        raise ConfigError(
            f"--tpla-listen-port {settings.listen_port}: {ranks} ranks take the ports up to {last_port}; the last is "
            f"{LAST_PORT}"
        )
    ports = range(settings.listen_port, last_port + 1)
    return {f"the {'data channels' if n % 2 else 'transfers'} of prefill rank {n // 2}": p for n, p in enumerate(ports)}


def check_distinct(ports: Mapping[str, int]) -> None:
    """Check that no two listeners of this machine share a port."""
    seen: dict[int, str] = {}
    for name, port in ports.items():
        if port in seen:
            raise ConfigError(f"{seen[port]} and {name} would both listen on port {port}; give each its own")
        seen[port] = name


def router_key(router: Sequence[Argument], key: str | None) -> list[str]:
    """Return the flags that give the router the servers' API key, unless its own flags do."""
    own = value_of(router, "api-key")
    if own is not None and own != key:
        raise ConfigError("--router.api-key must be the servers' --api-key, with which the router asks them")
    return ["--api-key", key] if key is not None and own is None else []


def for_router(arguments: Sequence[Argument]) -> list[Argument]:
    """Return the router's arguments, with hosts in the form that it needs."""
    result = []
    for argument in arguments:
        if argument.name in HOSTS:
            address = router_address(argument.name, argument.value or "")
            argument = Argument(argument.name, (f"--{argument.name}", address))
        if argument.name in ("prefill", "decode"):
            check_router_server(argument)
        result.append(argument)
    return result


def router_address(name: str, host: str) -> str:
    """Return the IP address of a host to listen on, IPv6 in brackets; the router takes no names of hosts or zones."""
    try:
        found = socket.getaddrinfo(without_brackets(host), None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"router: --{name} must be an address of this machine; {host!r} cannot be resolved: {error}"
        ) from error
    # Prefer IPv4, because a client of localhost tries both.
    _, _, _, _, (address, _, *zone) = min(found, key=lambda one: one[0] != socket.AF_INET)
    if not zone:
        return str(address)
    return f"[{str(address).partition('%')[0]}{f'%{zone[1]}' if zone[1] else ''}]"


def check_server_url(name: str, url: str) -> None:
    """Check a server's address before the router gets it."""
    try:
        parts = urlsplit(url)
        good = bool(parts.scheme and parts.hostname) and parts.netloc.count(":") <= 1
        good = good or re.fullmatch(r"\[[0-9A-Fa-f:.%]+\](:\d+)?", parts.netloc) is not None
        good = good and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good:
        raise ConfigError(
            f"--{name} must be the URL of a server, such as http://prefill-1:30000 or http://[::1]:30000; got {url!r}"
        )


def check_router_server(argument: Argument) -> None:
    """Check one server of the router's: a URL, which a bootstrap port may follow for a prefill server.

    With a wrong port every request would be refused, and the router drops any further values.
    """
    url, *more = argument.values or [""]
    check_server_url(argument.name, url)
    if len(more) > (argument.name == "prefill"):
        form = "URL [BOOTSTRAP_PORT]" if argument.name == "prefill" else "URL"
        raise ConfigError(
            f"--{argument.name} must be {form}, once for every {argument.name} server; got {' '.join([url, *more])}"
        )
    for port in more:
        if port.lower() != "none" and not (re.fullmatch(r"[0-9]{1,5}", port) and 1 <= int(port) <= LAST_PORT):
            raise ConfigError(
                f"--{argument.name} {url} must be followed by a bootstrap port from 1 to {LAST_PORT}, the prefill "
                f"server's --disaggregation-bootstrap-port, or none; got {port}"
            )


def for_server(arguments: Sequence[Argument]) -> list[Argument]:
    """Return a server's arguments, with IPv6 addresses without brackets, as SGLang needs them."""
    return [Argument(a.name, ("--host", without_brackets(a.value or ""))) if a.name == "host" else a for a in arguments]
