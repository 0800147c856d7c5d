"""The report of ``transfer.py``: ratios of goodput, values on the wire, and the lines that it prints."""

from collections.abc import Sequence
from typing import Any

from wire_values import wire_values


def ratios(rows: list[dict[str, Any]], tokens: int, figure: str) -> dict[str, float | None]:
    """Return our goodput over that of each other contestant at one length; None if one of them was not measured."""
    goodput = {row["contestant"]: row[figure] for row in rows if row["tokens"] == tokens}

    def over(name: str, ours: str) -> float | None:
        return goodput[ours] / goodput[name] if name in goodput and ours in goodput else None

    far, near, sealed = "agent, two hosts", "agent, one host", "agent, keys"
    cost = {place: over(f"{place}, unchecked", place) for place in (far, near)}
    return {
        "goodput_over_raw_tcp": over("raw TCP", far),
        "goodput_over_memcpy": over("cp through shm", near),
        "goodput_over_single_memcpy": over("memcpy", near),
        "goodput_over_mooncake": over("mooncake", far),
        "goodput_over_nixl": over("NIXL", far),
        "one_host_goodput_over_raw_tcp": over("raw TCP", near),
        "one_host_goodput_over_mooncake": over("mooncake", near),
        "one_host_goodput_over_nixl": over("NIXL", near),
        "sealed_goodput_over_raw_tcp": over("raw TCP", sealed),
        "sealed_goodput_over_unsealed": over(far, sealed),
        "sealed_goodput_over_tls": over("TLS 1.3", sealed),
        "sealed_goodput_over_zmq_curve": over("ZMQ CURVE", sealed),
        "goodput_over_zmq": over("ZMQ", far),
        "checksum_cost": None if (kept := cost[far]) is None else 1 - kept,
        "one_host_checksum_cost": None if (kept := cost[near]) is None else 1 - kept,
    }


def wire_counts() -> list[dict[str, Any]]:
    """Return the values of a token that are sent for 8 ranks of one host, in several layouts."""
    return [
        {"ranks": 8, "groups": groups, "shared": shared, "host": place, "values": wire_values(8, groups, shared, host)}
        for groups, shared in ((1, 0), (2, 128), (4, 128), (8, 64), (2, 0))
        for place, host in (("other host", "far"), ("this host", None))
    ]


def report(measured: Sequence[dict[str, Any]], tokens: Sequence[int]) -> dict[str, Any]:
    """Sum up the measurements of all lengths; the longest gives the main figures."""
    rows = [row for row in measured if "missing" not in row]
    counts, most = wire_counts(), max(tokens)
    return {
        **ratios(rows, most, "goodput_gb_s"),
        "wire_values_per_token": next(
            row["values"] for row in counts if (row["groups"], row["shared"], row["host"]) == (2, 128, "other host")
        ),
        "tokens": most,
        "medians": ratios(rows, most, "median_goodput_gb_s"),
        "at_other_lengths": {str(count): ratios(rows, count, "goodput_gb_s") for count in tokens if count != most},
        "wire_values": counts,
        "not_installed": {row["contestant"]: row["missing"] for row in measured if "missing" in row},
        "measurements": rows,
    }


def print_report(result: dict[str, Any]) -> None:
    """Print the values on the wire, every ratio, and the contestants that were not measured."""
    for row in result["wire_values"]:
        print(f"{row['values']:7.1f} values a token for 8 ranks of {row['host']}, g={row['groups']}, r={row['shared']}")
    for name, value in result.items():
        if value is None or isinstance(value, float):
            print(f"{name}: {None if value is None else round(value, 3)}")
    for name, why in result["not_installed"].items():
        print(f"{name} was not measured: {why}")
