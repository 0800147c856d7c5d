"""Flags that SGLang takes and this package refuses: an FP8 cache (but SGLang's name of bytes for sketched rows), and
context parallelism.
"""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_tpla.config import ConfigError, Settings


class Given(SimpleNamespace):
    """Flags before SGLang resolves them."""


def given(**changes: Any) -> Given:
    """Every flag of this release with its default, except those of a decode server on a CPU."""
    from sglang.srt.server_args import ServerArgs

    Given.__signature__ = inspect.signature(ServerArgs)
    role = {"disaggregation_mode": "decode", "disaggregation_transfer_backend": "tpla", "device": "cpu"}
    flags = {name: found.default for name, found in Given.__signature__.parameters.items()}
    return Given(**flags | role | changes)


@pytest.mark.parametrize("dtype", ["fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("rows", [None, "plain", "sketched"])
def test_an_fp8_cache(imported: None, monkeypatch: pytest.MonkeyPatch, rows: str | None, dtype: str) -> None:
    from sglang_tpla.host import validation
    from sglang_tpla.host.model import rows as row_choice

    for module in (validation, row_choice):
        monkeypatch.setattr(module, "settings", lambda: Settings("decode", rows=rows))
        monkeypatch.setattr(module, "artifact", lambda: None)
    validation.check_flags(given(kv_cache_dtype="auto"))
    if (rows, dtype) == ("sketched", "fp8_e4m3"):
        validation.check_flags(given(kv_cache_dtype=dtype))
        return
    with pytest.raises(ConfigError) as refusal:
        validation.check_flags(given(kv_cache_dtype=dtype))
    said = str(refusal.value)
    assert said.startswith(f"--kv-cache-dtype {dtype} does not go") and said.endswith(f"drop --kv-cache-dtype {dtype}")
    assert ("FP8 rows, which were retired" in said and "use --tpla-rows sketched" in said) == (rows != "sketched")


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_context_parallelism(imported: None, monkeypatch: pytest.MonkeyPatch, role: str) -> None:
    """Of a prompt's context ranks all but one have rooms that no decode rank asks for, and fail."""
    from sglang_tpla.host import validation
    from sglang_tpla.host.model import rows as row_choice

    for module in (validation, row_choice):
        monkeypatch.setattr(module, "settings", lambda: Settings(role))
        monkeypatch.setattr(module, "artifact", lambda: None)
    validation.check_flags(given(disaggregation_mode=role))
    with pytest.raises(ConfigError, match=r"--attn-cp-size does not go with sglang_tpla: .*drop --attn-cp-size"):
        validation.check_flags(given(disaggregation_mode=role, attn_cp_size=2))
