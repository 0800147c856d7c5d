"""An error of a control request is the answer to that request, and does not end the scheduler.

SGLang's scheduler calls the handlers of control requests (new weights, profiles, memory) without catching errors. The
hook after ``Scheduler.init_request_dispatcher`` (``sglang/srt/managers/scheduler.py``) wraps each of them in a
`Guarded`, which logs an error and answers with the handler's own type of output. Where this type has no field for a
reason, the reason travels in the output's id; the hook around ``FanOutCommunicator.__call__``
(``sglang/srt/managers/communicator.py``), which waits for outputs in the process that serves HTTP, turns it into status
400. A request without an output (a pause, say) was answered before its handler ran; its error is in the log alone.

**Ranks.** All ranks run the same handlers in the same order. After each handler they tell each other, in a process
group that nothing else uses, whether it failed. If it failed on all of them, they are still alike and go on. If it
failed on some of them, they go on only where nothing later depends on what the handler did (`APART`); otherwise the
error ends the server, as in SGLang, because ranks that schedule differently would wait for each other for good. If a
rank does not come, because it waits inside the handler for one that failed, the one that failed ends the server after
the time that SGLang's watchdog gives to a step.

Generation requests, aborts and the shutdown are not guarded: `admission` and `aborts` deal with their errors. An error
of the GPU passes too, because the process cannot go on after it.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from sglang.srt.managers import io_struct
from starlette.exceptions import HTTPException

from sglang_tpla.errors import SglangTplaError
from sglang_tpla.host import compat
from sglang_tpla.host.requests.declined import RESERVED
from sglang_tpla.host.requests.memory import CHECKS

logger = logging.getLogger(__name__)

UNGUARDED = (
    io_struct.TokenizedGenerateReqInput,
    io_struct.TokenizedEmbeddingReqInput,
    io_struct.BatchTokenizedGenerateReqInput,
    io_struct.BatchTokenizedEmbeddingReqInput,
    io_struct.AbortReq,
    io_struct.ShutdownReq,
)
# Requests that read, log or write files: ranks of which only some succeeded go on alike.
APART = (
    io_struct.ProfileReq,
    io_struct.ExpertDistributionReq,
    io_struct.GetInternalStateReq,
    io_struct.GetWeightsByNameReqInput,
    io_struct.CheckWeightsReqInput,
    io_struct.ConfigureLoggingReq,
    io_struct.FreezeGCReq,
)
TEXTS = ("message", "error_message", "error")
FAILED = RESERVED + "failed: "  # begins the id of an output that stands for an exception
MAX_REASON_CHARACTERS = 1024


class RanksDiffer(SglangTplaError, RuntimeError):
    """A control request that changed some ranks and failed on others, or that some ranks never finished."""


@dataclass(frozen=True)
class Ranks:
    """The ranks that run the same handlers in the same order.

    Args:
        group: their process group on the CPU; None for a rank that is alone.
        patience_s: how long a rank that failed waits for the others. One that did not waits as long as for any
            collective operation, because another rank may take minutes longer for its weights.
    """

    group: Any
    patience_s: float

    def gather(self, problem: str) -> list[str]:
        """Return every rank's problem, in the order of ranks; an empty string stands for none.

        Raises:
            RanksDiffer: a rank that did not answer in time, or ended.
        """
        if self.group is None:
            return [problem]
        said = [""] * dist.get_world_size(self.group)
        failed = torch.tensor([bool(problem)], dtype=torch.int32)
        wait = [timedelta(seconds=self.patience_s)] if problem else []
        try:
            dist.all_reduce(failed, dist.ReduceOp.MAX, group=self.group, async_op=True).wait(*wait)
            if failed.item():
                dist.all_gather_object(said, problem, group=self.group)
        except RuntimeError as error:
            raise RanksDiffer(f"a rank does not finish the control request; here: {problem or 'done'}") from error
        return said


@dataclass(frozen=True)
class Guarded:
    """A handler of control requests that may fail without an end to its scheduler.

    Args:
        scheduler: SGLang's scheduler.
        handler: SGLang's handler.
        ranks: the ranks that run it.
    """

    scheduler: Any
    handler: Callable[[Any], Any]
    ranks: Ranks

    def __call__(self, request: Any) -> Any:
        output, caught, problem = None, None, ""
        try:
            if check := CHECKS.get(type(request)):
                check(self.scheduler.weight_updater, request)
            output = self.handler(request)
        except Exception as error:
            if is_final(error):
                raise
            logger.exception("%s failed", type(request).__name__)
            caught, problem = error, f"{type(error).__name__}: {error}"
        said = self.ranks.gather(problem)
        if not any(said):
            if isinstance(output, io_struct.ProfileReqOutput) and not output.success:
                output.rid = FAILED + output.message  # SGLang answers 500 without it
            return output
        if not all(said) and not isinstance(request, APART):
            raise RanksDiffer(f"{type(request).__name__} failed on some ranks alone: {joined(said)}") from caught
        if isinstance(request, io_struct.ProfileReq):
            forget_profile(self.scheduler.profiler_manager)
        return failure(request, joined(said))


def guard(result: Any, self: Any) -> None:
    """Hook after ``Scheduler.init_request_dispatcher``."""
    ranks = Ranks(make_group(self), compat.resolved(self.server_args).watchdog_timeout or 300)
    handlers = self._request_dispatcher._mapping
    for kind, handler in handlers.items():
        if kind not in UNGUARDED:
            handlers[kind] = Guarded(self, handler, ranks)


def make_group(scheduler: Any) -> Any:
    """Make the process group of the ranks that receive this scheduler's control requests, or return None for one."""
    members = dist.get_process_group_ranks(compat.control_group(scheduler))
    if len(members) == 1:
        return None
    return dist.new_group(members, backend="gloo", use_local_synchronization=True)


async def answer(original: Callable[..., Any], self: Any, obj: Any) -> Any:
    """Hook around ``FanOutCommunicator.__call__``: answer 400 where a scheduler's handler failed.

    Raises:
        HTTPException: the reason.
    """
    results = await original(self, obj)
    ids = [getattr(result, "rid", None) or "" for result in results]
    if said := [rid.removeprefix(FAILED) for rid in ids if rid.startswith(FAILED)]:
        raise HTTPException(400, joined(said))
    return results


def is_final(error: Exception) -> bool:
    """Return whether a process is of no use after an exception: CUDA and NCCL fail every later call too."""
    return isinstance(error, torch.AcceleratorError | dist.DistBackendError) or "CUDA error" in str(error)


def joined(said: list[str]) -> str:
    """Return what ranks said, each sentence once."""
    return " | ".join(dict.fromkeys(filter(None, said)))[:MAX_REASON_CHARACTERS]


def failure(request: Any, reason: str) -> Any:
    """Return the output that answers a request with a reason, or None where SGLang has no output for its type."""
    kind = output_type(type(request))
    if kind is None:
        return None
    fields = msgspec.structs.fields(kind)
    values: dict[str, Any] = {field.name: reason for field in fields if field.name in TEXTS}
    if not values or kind is io_struct.ProfileReqOutput:
        values["rid"] = FAILED + reason
    for field in fields:
        if field.required and field.name not in values:  # among them ``success`` and ``updated``, which become false
            values[field.name] = getattr(request, field.name, None) or empty(field.type)
    return kind(**values)


def output_type(request_type: type) -> type | None:
    """Return the type of the output that SGLang sends for a type of request; None for one that nobody waits for."""
    return getattr(io_struct, request_type.__name__.removesuffix("Input") + "Output", None)


def empty(kind: Any) -> Any:
    """Return the least value of a field's type."""
    values: tuple[Any, ...] = (None, False, 0, "", [], {})
    for value in values:
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError:
            continue
    raise TypeError(f"{kind} has no empty value")


def forget_profile(profiler: Any) -> None:
    """Let a profiler take the next profile after one that failed, which it would continue for good."""
    if getattr(profiler, "torch_profiler", None) is not None:
        try:
            profiler.torch_profiler.stop()
        except Exception:
            logger.exception("a profile could not be stopped")
    profiler.torch_profiler = profiler.profiler_start_forward_ct = profiler.profiler_target_forward_ct = None
    profiler.profile_in_progress = profiler.profile_by_stage = False
