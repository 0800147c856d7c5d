"""The dashboard that is shipped."""

import json
import re
from pathlib import Path

DASHBOARD = Path(__file__).resolve().parents[1] / "launch" / "monitoring" / "dashboard.json"


def asked_series() -> set[str]:
    """Names, without their prefix, of the series of this package that its expressions ask for."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    return {name for text in expressions for name in re.findall(r"sglang_tpla:(\w+)", text)}
