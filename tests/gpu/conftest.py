"""Tests in this folder need a Hopper GPU; without one they are deselected, not failed and not skipped.

``SGLANG_TPLA_TEST_ENGINE_ON_CPU=1`` runs the engine's tests on a CPU, to try the tests themselves:
``pytest -m gpu -k nano tests/gpu/test_engine.py``, ``pytest -m gpu tests/gpu/test_grammars.py``, and likewise
``test_statistics.py``.
"""

import os

import pytest
import torch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        return
    tried = os.environ.get("SGLANG_TPLA_TEST_ENGINE_ON_CPU") == "1"
    on_cpu = ("test_engine.py", "test_grammars.py", "test_statistics.py") if tried else ()
    away = [item for item in items if item.get_closest_marker("gpu") and item.path.name not in on_cpu]
    if away:
        config.hook.pytest_deselected(items=away)
        items[:] = [item for item in items if item not in away]
