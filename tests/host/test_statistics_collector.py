"""Statistics of a prefill server count served tokens: no captured graph hides prompts, and no made-up token counts."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_tpla.config import ConfigError, Settings
from sglang_tpla.measure.statistics import LayerMoments
from tests.host.test_flags import given

COLLECTS = Settings("prefill", statistics_folder="/tmp/statistics")


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize(
    "asked",
    [
        {"cuda_graph_backend_prefill": "breakable"},
        {"cuda_graph_config": {"decode": {"backend": "full"}, "prefill": {"backend": "full"}}},
        {"cuda_graph_config": {"prefill": {"backend": "breakable"}}, "cuda_graph_backend_prefill": "disabled"},
    ],
)
def test_graphs_of_prompts_are_refused(monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]) -> None:
    from sglang_tpla.host import validation

    def check(settings: Settings) -> None:
        monkeypatch.setattr(validation, "settings", lambda: settings)
        monkeypatch.setattr(validation, "sketched", lambda: False)
        validation.check_flags(given(disaggregation_mode="prefill", **asked))

    check(Settings("prefill"))
    with pytest.raises(ConfigError, match=r"--cuda-graph-backend-prefill (breakable|full) does not go with .*; drop"):
        check(COLLECTS)


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize("collects", [False, True])
def test_prompts_run_without_graphs_where_statistics_are_kept(monkeypatch: pytest.MonkeyPatch, collects: bool) -> None:
    from sglang_tpla.host import validation

    monkeypatch.setattr(validation, "settings", lambda: COLLECTS if collects else Settings("prefill"))
    monkeypatch.setattr(validation, "sketched", lambda: False)
    for name in ("check_address", "check_statistics_folder", "check_model", "name_server"):
        monkeypatch.setattr(validation, name, lambda *args: None)
    monkeypatch.setattr(validation, "local_config", lambda path: {})
    monkeypatch.setattr(validation.compat, "resolved", lambda args: args)
    seen: list[bool] = []
    args = given(disaggregation_mode="prefill", model_path="m")
    validation.check_server_args(lambda record: seen.append(record.disable_prefill_cuda_graph), args)
    assert seen == [collects]


@pytest.mark.usefixtures("engine")
def test_tokens_of_captures_and_health_checks_do_not_count(tmp_path: Path) -> None:
    from sglang.srt.model_executor.runner_utils.capture_mode import model_capture_mode

    from sglang_tpla.host.statistics_collector import Collector

    moments = LayerMoments.zeros(8, 2, 3, "cpu")
    attention = SimpleNamespace(
        q_lora_rank=None, q_proj=torch.nn.Linear(5, 2 * (3 + 1)), kv_a_layernorm=torch.nn.LayerNorm(8),
        num_local_heads=2, qk_nope_head_dim=3, qk_rope_head_dim=1,
    )  # fmt: skip
    attention.q_proj.forward = lambda hidden: (torch.ones(len(hidden), 8), None)  # as SGLang's linear layers return it
    meta: Any = None
    Collector(meta, [moments], tmp_path / "sums", every_tokens=1000).watch(0, attention)

    def step(tokens: int) -> None:
        attention.kv_a_layernorm(torch.randn(tokens, 8))
        attention.q_proj(torch.randn(tokens, 5))

    step(4)
    sums = moments.latent_outer.clone()
    with model_capture_mode():
        step(2000)
    step(1)
    assert (moments.latent_count, moments.query_count) == (4, 4) and torch.equal(moments.latent_outer, sums)
    step(3)
    assert (moments.latent_count, moments.query_count) == (7, 7)


@pytest.mark.usefixtures("engine")
def test_a_folder_that_is_lost_ends_no_prompt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The sums are written in the middle of a prompt's step, where an exception would end the server."""
    from sglang_tpla.host.statistics_collector import Collector

    (tmp_path / "lost").touch()
    meta: Any = None
    collector = Collector(meta, [LayerMoments.zeros(8, 2, 3, "cpu")], tmp_path / "lost" / "sums", every_tokens=4)
    observe = [collector._observer(0, name, lambda output: output) for name in ("latent", "q_nope")]
    for _ in range(2):
        observe[0](torch.nn.Identity(), None, torch.randn(4, 8))
        observe[1](torch.nn.Identity(), None, torch.randn(4, 2, 3))
    assert caplog.text.count("tokens were not written: ") == 2 and collector.statistics.tokens == 8


@pytest.mark.usefixtures("imported")
def test_a_folder_that_cannot_be_made_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sglang_tpla.host import validation

    (tmp_path / "file").touch()
    for folder in (tmp_path / "new" / "folder", tmp_path / "file"):
        monkeypatch.setattr(validation, "settings", lambda: Settings("prefill", statistics_folder=str(folder)))  # noqa: B023
        if folder.name == "folder":
            validation.check_statistics_folder()
        else:
            with pytest.raises(ConfigError, match=f"--tpla-statistics-folder {folder}: expected a folder to write to"):
                validation.check_statistics_folder()
