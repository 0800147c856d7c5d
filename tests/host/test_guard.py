"""An error of a control request's handler becomes that request's answer."""

from types import ModuleType
from typing import Any

import msgspec
import pytest
import torch


@pytest.fixture
def kinds(imported: None) -> ModuleType:
    from sglang.srt.managers import io_struct

    return io_struct


def answer(request: Any, error: Exception) -> Any:
    """Return what a scheduler gets from its dispatcher if the handler of ``request`` raises ``error``."""
    from sglang.utils import TypeBasedDispatcher

    from sglang_tpla.host.requests.guard import dispatch

    def handler(_: Any) -> None:
        raise error

    return dispatch(TypeBasedDispatcher.__call__, TypeBasedDispatcher([(type(request), handler)]), request)


def test_the_answer_says_that_the_request_failed(kinds: ModuleType) -> None:
    load = kinds.UpdateWeightFromDiskReqInput(model_path="here", load_format="none")
    said = answer(load, KeyError("none"))
    assert isinstance(said, kinds.UpdateWeightFromDiskReqOutput)
    assert said.success is False and said.message == "KeyError: 'none'"
    said = answer(kinds.SetInternalStateReq(server_args={}), TypeError("what"))
    assert isinstance(said, kinds.SetInternalStateReqOutput) and said.updated is False


def test_every_control_request_has_an_answer(kinds: ModuleType) -> None:
    named = {name: kind for name, kind in vars(kinds).items() if isinstance(kind, type) and "Req" in name}
    answered = {name.removesuffix("Input") + "Output": name for name in named}
    pairs = [(named[asked], named[name]) for name, asked in answered.items() if name in named]
    assert len(pairs) > 20
    for asked, answers in pairs:
        required = {field.name: None for field in msgspec.structs.fields(asked) if field.required}
        said = answer(asked(**required), ValueError("why"))
        assert type(said) is answers
        assert getattr(said, "success", False) is False


def test_nobody_waits_for_an_answer(kinds: ModuleType) -> None:
    assert answer(kinds.FreezeGCReq(), ValueError("why")) is None


def test_other_errors_pass(kinds: ModuleType) -> None:
    flush = kinds.FlushCacheReqInput()
    for request, error in (
        (kinds.AbortReq(rid="a"), ValueError("why")),
        (object(), ValueError("an unknown message")),
        (flush, RuntimeError("CUDA error: an illegal memory access was encountered")),
        (flush, torch.AcceleratorError("gone")),
    ):
        with pytest.raises(type(error)):
            answer(request, error)
