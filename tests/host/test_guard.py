"""A control request whose handler raises is answered with the reason, on one rank and on several."""

import asyncio
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
import torch.distributed as dist

from tests.ports import free_ports

pytestmark = pytest.mark.usefixtures("imported")
ROOT = Path(__file__).resolve().parents[2]
# Nobody waits for the handlers of these.
ONE_WAY = {"CloseSessionReqInput", "PauseGenerationReqInput", "ContinueGenerationReqInput", "FreezeGCReq",
           "ConfigureLoggingReq"}  # fmt: skip


class Anything:
    """A scheduler of which only the names matter, as SGLang's method reads them for its dispatcher."""

    def __getattr__(self, name: str) -> Any:
        return Anything()


def dispatcher(scheduler: Any) -> Any:
    """Return SGLang's own dispatcher of requests, with the handlers of ``scheduler``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang.srt.managers.scheduler import Scheduler
    Scheduler.init_request_dispatcher(scheduler)
    return scheduler._request_dispatcher


def guarded(handler: Any, scheduler: Any = None) -> Any:
    from sglang_tpla.host.requests.guard import Guarded, Ranks

    return Guarded(scheduler or Anything(), handler, Ranks(None, 0))


def broken(_: Any) -> None:
    raise KeyError("what is gone")


def received(output: Any) -> Any:
    """Return what the process that serves HTTP makes of a rank's output, which passes through SGLang's codec."""
    from sglang.srt.managers import io_struct

    from sglang_tpla.host.requests.guard import answer

    async def original(*_: Any) -> list[Any]:
        return [io_struct.msgpack_decode(io_struct.msgpack_encode(output))]

    (read,) = asyncio.run(answer(original, None, None))
    return read


def test_every_control_request_of_sglangs_dispatcher_has_an_answer() -> None:
    from sglang.srt.managers import io_struct
    from starlette.exceptions import HTTPException

    from sglang_tpla.host.requests.guard import TEXTS, UNGUARDED, output_type

    kinds = dispatcher(Anything())._mapping
    assert set(UNGUARDED) < set(kinds) and len(kinds) > 35
    for kind in set(kinds) - set(UNGUARDED):
        request = kind(**{field.name: None for field in msgspec.structs.fields(kind) if field.required})
        # These two are checked first, and a checked request fails in the same way.
        scheduler = SimpleNamespace(weight_updater=SimpleNamespace(offload_tags=set()), profiler_manager=Anything())
        said = guarded(broken, scheduler)(request)
        if kind.__name__ in ONE_WAY:
            assert said is None
            continue
        assert said is not None, f"guard.output_type does not find the output of {kind.__name__}"
        read = io_struct.msgpack_decode(io_struct.msgpack_encode(said))
        assert type(read) is output_type(kind)
        assert not getattr(read, "success", False) and not getattr(read, "updated", False)
        why = "not released" if "Resume" in kind.__name__ else "what is gone"
        if read.rid is None:
            assert why in "".join(getattr(read, name, "") for name in TEXTS) and read.success is False
            continue
        with pytest.raises(HTTPException) as refused:
            received(said)
        assert refused.value.status_code == 400 and why in refused.value.detail


def test_the_hook_wraps_sglangs_own_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.managers import io_struct

    from sglang_tpla.host.requests import guard

    monkeypatch.setattr(guard, "make_group", lambda _: None)
    scheduler: Any = Anything()
    requests = dispatcher(scheduler)
    guard.guard(None, scheduler)
    scheduler.weight_updater = SimpleNamespace(offload_tags=set())
    said = requests(io_struct.ResumeMemoryOccupationReqInput())
    assert isinstance(said, io_struct.ResumeMemoryOccupationReqOutput) and "not released" in (said.rid or "")
    assert not any(isinstance(requests._mapping[kind], guard.Guarded) for kind in guard.UNGUARDED)


def test_an_answer_passes_unchanged() -> None:
    from sglang.srt.managers import io_struct

    output = io_struct.GetWeightsByNameReqOutput(parameter=[1.0])
    assert guarded(lambda _: output)(io_struct.GetWeightsByNameReqInput(name="a")) is output
    assert received(output) == output


@pytest.mark.parametrize("error", [torch.AcceleratorError("gone"), RuntimeError("CUDA error: an illegal access")])
def test_a_process_without_its_gpu_ends(error: Exception) -> None:
    from sglang.srt.managers import io_struct

    def lost(_: Any) -> None:
        raise error

    with pytest.raises(type(error)):
        guarded(lost)(io_struct.FreezeGCReq())


def test_memory_that_is_released_twice_or_was_not_released() -> None:
    from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput, ResumeMemoryOccupationReqInput

    held = {"weights"}
    scheduler = SimpleNamespace(weight_updater=SimpleNamespace(offload_tags=held))
    for kind, tags, why in (
        (ReleaseMemoryOccupationReqInput, ["weights"], "already released: weights"),
        (ReleaseMemoryOccupationReqInput, None, "already released: weights"),
        (ReleaseMemoryOccupationReqInput, ["kv_cache", "kv_cache"], "must differ"),
        (ResumeMemoryOccupationReqInput, ["weights", "nothing"], "among"),
        (ResumeMemoryOccupationReqInput, [], "not released: cuda_graph, kv_cache"),
        (ResumeMemoryOccupationReqInput, ["weights"], None),
        (ReleaseMemoryOccupationReqInput, ["kv_cache"], None),
    ):
        said = guarded(lambda _: None, scheduler)(kind(tags=tags))
        assert (said is None) if why is None else (why in said.rid), (kind, tags, said)
    assert held == {"weights"}


def test_the_next_request_is_answered_after_a_failure() -> None:
    """SGLang's communicator hands out one request at a time, and must not keep the failed one."""
    from sglang.srt.managers import io_struct
    from sglang.srt.managers.communicator import FanOutCommunicator
    from starlette.exceptions import HTTPException

    from sglang_tpla.host.requests.guard import answer

    request = io_struct.SlowDownReqInput(forward_sleep_time=1)
    outputs = [guarded(broken)(request), io_struct.SlowDownReqOutput()]

    async def run() -> None:
        communicator: Any = FanOutCommunicator(
            lambda _: loop.call_soon(lambda: communicator.handle_recv(outputs[0])), 1
        )
        loop = asyncio.get_running_loop()
        with pytest.raises(HTTPException, match="what is gone"):
            await answer(FanOutCommunicator.__call__, communicator, request)
        del outputs[0]
        assert await answer(FanOutCommunicator.__call__, communicator, request) == outputs

    asyncio.run(run())


def test_a_failed_profile_does_not_go_on() -> None:
    from sglang.srt.managers import io_struct

    stopped: list[bool] = []
    profiler = SimpleNamespace(torch_profiler=SimpleNamespace(stop=lambda: stopped.append(True)))
    profiler.profile_in_progress = profiler.profile_by_stage = True
    said = guarded(broken, SimpleNamespace(profiler_manager=profiler))(io_struct.ProfileReq())
    assert said.success is False and "what is gone" in said.rid and stopped and profiler.torch_profiler is None
    assert not profiler.profile_in_progress and not profiler.profile_by_stage


def test_a_profile_that_sglang_refuses_itself_says_why_and_leaves_the_running_one() -> None:
    from sglang.srt.managers import io_struct
    from starlette.exceptions import HTTPException

    refused = io_struct.ProfileReqOutput(success=False, message="Profiling is already in progress.")
    said = guarded(lambda _: refused, SimpleNamespace())(io_struct.ProfileReq())
    with pytest.raises(HTTPException, match="already in progress"):
        received(said)


def run_rank(number: int, port: int) -> None:
    """Run one of two ranks: requests that fail on both, on the second one and on none, in that order."""
    from sglang.srt.managers import io_struct

    from sglang_tpla.host.requests.guard import Guarded, Ranks, RanksDiffer

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=2)
    ranks = Ranks(dist.new_group([0, 1], backend="gloo", use_local_synchronization=True), patience_s=200)

    def handler(request: Any) -> Any:
        if request.name == "both" or (request.name == "one" and number == 1):
            raise ValueError(f"{request.name} failed")
        return io_struct.GetWeightsByNameReqOutput(parameter=[1.0])

    for name, failed in (("both", True), ("one", True), ("none", False)):
        said = Guarded(None, handler, ranks)(io_struct.GetWeightsByNameReqInput(name=name))
        assert (said.parameter is None and f"{name} failed" in said.rid) == failed, said

    store = dist.distributed_c10d._get_default_store()  # rank 0 has it, and has to end last

    def fail_second(request: Any) -> Any:
        if number == 1:
            raise ValueError("half of it")
        if request.mode == "in_place":  # as in a collective operation inside the handler
            store.wait(["the other rank"])

    for mode, patience_s in (("retract", 200), ("in_place", 1)):
        try:
            Guarded(None, fail_second, replace(ranks, patience_s=patience_s))(
                io_struct.PauseGenerationReqInput(mode=mode)
            )
        except RanksDiffer as error:
            print(error, flush=True)
            if number == 1 and mode == "in_place":
                store.set("the other rank", "has ended")


def test_ranks_answer_alike_and_end_where_they_would_schedule_differently() -> None:
    (port,) = free_ports(1)
    code = f"from tests.host.test_guard import run_rank; import sys; run_rank(int(sys.argv[1]), {port})"
    processes = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, str(number)], cwd=ROOT,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for number in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    for out, _ in said:
        assert "PauseGenerationReqInput failed on some ranks alone: ValueError: half of it" in out, said
        assert "a rank does not finish the control request" in out, said
