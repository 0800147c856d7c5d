"""A prefill server's calibration statistics are the PyTorch model's sums over the prompts that the server computed.

On a GPU SGLang would run prompts from CUDA graphs, in which the collector's Python does not run.
"""

from pathlib import Path

import pytest
import torch

from sglang_tpla.measure.statistics import Statistics, collect
from sglang_tpla.reference_model.forward import PlainModel
from tests.e2e.prompts import encoded, short_prompts
from tests.gpu.engine import ANY_WIDTH, DEVICE, PROMPT_ATTENTION, Engines

pytestmark = pytest.mark.gpu
BAR = 0.02 if DEVICE == "cuda" else 1e-4  # relative error of the sums; activations on a GPU are bfloat16


def test_statistics_are_those_of_the_prompts(nano_mla: str, tmp_path: Path) -> None:
    prompts = encoded(nano_mla, short_prompts(6, seed=4))
    folder = tmp_path / "statistics"
    engines = Engines(nano_mla, tmp_path)
    try:
        engines.start_prefill(
            "--tpla-statistics-folder", str(folder), "--tpla-statistics-every-tokens", "1", "--disable-radix-cache",
            prompts=PROMPT_ATTENTION,
        )  # fmt: skip
        engines.decode("decode", 1, "--tpla-groups", "1", *ANY_WIDTH)
        pair = engines.pair("decode")
        for prompt in prompts:
            pair.generate(prompt, 2)
    finally:
        engines.stop()
    (written,) = folder.iterdir()
    with torch.inference_mode():
        right = collect(PlainModel(nano_mla, device=DEVICE), [torch.tensor([prompt]) for prompt in prompts])
    for found, expected in zip(Statistics.load(written).layers, right, strict=True):
        assert found.latent_count == found.query_count == sum(map(len, prompts))
        for name in ("latent_sum", "latent_outer", "query_outer"):
            one, other = getattr(found, name), getattr(expected, name)
            assert (one - other).norm() <= BAR * other.norm(), name
