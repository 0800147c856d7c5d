"""Hooks where a request enters the server: on ``TokenizerManager`` and on the OpenAI endpoints.

A mistake in a request becomes a `RequestRefused` here, which SGLang answers with status 400: routers do not retry, and
no circuit breaker opens. Routers would retry a 500 again and again, and then close the service to everyone.
"""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import msgspec
from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST
from sglang.srt.managers.io_struct import AbortReq, GenerateReqInput
from sglang.srt.managers.tokenizer_manager import ServerStatus
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

from sglang_tpla.host import compat
from sglang_tpla.host.disaggregation.prefill_lookup import MAX_RANKS
from sglang_tpla.host.process import serves_decode
from sglang_tpla.host.requests.bodies import happened_in
from sglang_tpla.host.requests.declined import RESERVED, declined
from sglang_tpla.host.requests.fields import Limits, RequestRefused, check_item, check_rooms_differ, check_verified
from sglang_tpla.host.requests.patterns import check_grammar, check_stops
from sglang_tpla.host.requests.samples import give_each_its_room

TOP_LOGPROBS = 128  # MetadataBuffers(max_top_logprobs_num=128)
# Python raises these for a value of the wrong type or form.
WRONG_VALUE = (TypeError, KeyError, IndexError, AttributeError, ArithmeticError, AssertionError, re.error,
               msgspec.MsgspecError, RecursionError)  # fmt: skip
NOT_OF_TEMPLATES = {"chat_template", "padding", "max_length", "truncation", "tokenize", "return_tensors", "return_dict",
                    "return_assistant_tokens_mask", "tokenizer_kwargs"}  # fmt: skip
# Functions of SGLang in which an error is the scheduler's answer.
WAITS_FOR_SCHEDULER = ("_wait_one_response", "_stream_one_response")
OPAQUE = ("input_ids", "mm_inputs", "mm_data_mooncake", "time_stats", "input_embeds", "positional_embed_overrides",
          "sampling_params", "session_params", "num_items_assigned")  # fmt: skip

logger = logging.getLogger(__name__)


def limits(manager: Any) -> Limits:
    """Return the limits of the server behind a tokenizer manager."""
    # A decode server learns a prefill server's number of ranks later (`admission.py`).
    ranks = MAX_RANKS if serves_decode() else compat.data_parallel_ranks(manager.server_args)
    return Limits(
        manager.model_config.vocab_size, TOP_LOGPROBS, ranks, FAKE_BOOTSTRAP_HOST,
        speculates=compat.speculates(manager.server_args),
        seeded=compat.samples_by_seed(manager.server_args),
        labels=frozenset(manager.server_args.tokenizer_metrics_allowed_custom_labels or ()),
    )  # fmt: skip


def is_own(manager: Any, obj: Any, request: Any) -> bool:
    """Return whether the server sends the request to itself, to warm up or to check its health, without a transfer.

    SGLang marks such requests with a special host, and would serve any client that names it from unwritten pages.

    Args:
        request: the HTTP request. Health checks come by GET, and a client can ask for nothing else by GET; but a client
            could write everything that is in ``obj``.
    """
    if obj.bootstrap_host != FAKE_BOOTSTRAP_HOST and obj.bootstrap_host != [FAKE_BOOTSTRAP_HOST]:
        return False
    if manager.server_status == ServerStatus.Starting:
        return True
    checks_health = isinstance(obj.rid, str) and obj.rid.startswith(HEALTH_CHECK_RID_PREFIX) and not obj.log_metrics
    return checks_health and getattr(request, "method", None) == "GET"


async def generate(
    original: Callable[..., AsyncIterator[Any]], self: Any, obj: Any, request: Any = None
) -> AsyncIterator[Any]:
    """Hook around ``TokenizerManager.generate_request``: check the request, and tell the other server of a refusal."""
    answered = False
    try:
        if isinstance(obj, GenerateReqInput) and not is_own(self, obj, request):
            check_rid(obj.rid)
            give_each_its_room(obj)
        async with aclosing(original(self, obj, request)) as outputs:  # type: ignore[type-var]
            async for output in outputs:
                answered = True
                yield output
    except (GeneratorExit, asyncio.CancelledError):  # the client hung up
        abort_forgotten(self, obj)
        raise
    except Exception as error:
        if answered:
            raise
        problem = explained(error)
        if not happened_in(error, *WAITS_FOR_SCHEDULER):  # a scheduler that refuses a request says so itself
            tell_other_server(self, obj, problem)
        if problem is error:
            raise
        raise problem from error


def explained(error: Exception) -> Exception:
    """Return an error over a value of the wrong type as a refusal with status 400, and other errors unchanged."""
    if not isinstance(error, WRONG_VALUE):
        return error
    logger.error("a request that cannot be read", exc_info=error)
    return RequestRefused(f"a field of the request has a wrong value: {error}")


def tell_other_server(manager: Any, obj: Any, problem: Exception) -> None:
    """Let the schedulers tell the other server that a request will not come."""
    message = declined(obj, "decode" if serves_decode() else "prefill", problem)
    if message is None:
        return
    try:
        asyncio.get_running_loop()
    except RuntimeError:  # later releases convert requests on other threads than the socket's
        if manager.event_loop is not None:
            manager.event_loop.call_soon_threadsafe(manager._dispatch_to_scheduler, message)
    else:
        manager._dispatch_to_scheduler(message)


def abort_forgotten(manager: Any, obj: Any) -> None:
    """Abort a request whose client has hung up, where SGLang forgets the request before its own abort.

    SGLang 0.5.18 and 0.5.19 do so: their abort comes two seconds later and ignores unknown ids.
    """
    if not hasattr(manager, "_discard_pending_req_states"):
        return
    for rid in obj.rid if isinstance(obj.rid, list) else [obj.rid]:
        if rid is not None:
            manager._dispatch_to_scheduler(AbortReq(rid=rid))


def check_rid(rid: Any) -> None:
    """Refuse empty ids, this package's own, and those of health checks, which SGLang drops while it is busy."""
    reserved = (HEALTH_CHECK_RID_PREFIX, RESERVED)
    for one in rid if isinstance(rid, list) else [rid]:
        if one is not None and (not isinstance(one, str) or not one or one.startswith(reserved)):
            raise RequestRefused(
                f"rid must be a string that is not empty and begins with none of {list(reserved)}; got {one!r}"
            )


def check_normalized(self: Any, obj: Any, request: Any = None, *args: Any, **kwargs: Any) -> None:
    """Hook before ``TokenizerManager._init_req_state``: check the whole batch before its first request leaves.

    A request that the server sends to itself has no transfer. Its other fields are checked too, because a client's
    request looks the same while a server warms up.
    """
    if not isinstance(obj, GenerateReqInput):
        return
    transferred = not is_own(self, obj, request)
    items = [obj] if obj.is_single else [obj[i] for i in range(obj.batch_size)]
    bounds = limits(self)
    for item in items:
        check_item(item, bounds, transferred)
        check_stops(item.sampling_params)
        check_grammar(item.sampling_params, bounds.vocab)
        if item.custom_logit_processor is not None and self.server_args.enable_custom_logit_processor:
            check_processor(item.custom_logit_processor)
        params = self.sampling_params_class(**{**(self.preferred_sampling_params or {}), **item.sampling_params})
        # The scheduler encodes and decodes the parameters in the same way.
        msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=type(params))
        params.normalize(self.tokenizer)
        params.verify(bounds.vocab)
        check_verified(params.min_p, bounds)
    if transferred:
        check_rooms_differ(items)


def check_processor(text: Any) -> None:
    """Refuse a logit processor that the scheduler could not load; the scheduler would end.

    Loading it runs the client's code, which ``--enable-custom-logit-processor`` allows.
    """
    try:
        loaded: Any = CustomLogitProcessor.from_str(text)
    except Exception as error:  # whatever the client's code raises
        loaded = f"{type(error).__name__}: {error}"
    if not callable(loaded):
        raise RequestRefused(
            f"custom_logit_processor must be what CustomLogitProcessor.to_str() returns; got {text!r:.80}, which gives "
            f"{loaded!r:.120}"
        )


def check_wire(result: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """Hook after ``TokenizerManager._create_tokenized_object``: check the types that the scheduler's decoder needs.

    A field of another type would end the scheduler. So would a prompt without tokens, such as an empty text where the
    tokenizer puts no token before it.
    """
    if result.input_ids is not None and not len(result.input_ids):
        raise RequestRefused("the prompt has no tokens: text or input_ids must not be empty")
    for field in msgspec.structs.fields(type(result)):
        value = getattr(result, field.name)
        if field.name in OPAQUE or value is None or value == field.default:
            continue
        try:
            msgspec.convert(value, field.type)
        except msgspec.ValidationError as error:
            raise RequestRefused(f"{field.name}: {error}; got {value!r:.80}") from error


def check_template(request: Any) -> None:
    """Refuse a chat template of the client's, a program that may take all of the server's time or memory.

    Arguments that go to the tokenizer instead of the template are refused as well.
    """
    if wrong := sorted(NOT_OF_TEMPLATES.intersection(getattr(request, "chat_template_kwargs", None) or ())):
        raise RequestRefused(
            f"chat_template_kwargs is for what the server's chat template reads (--chat-template); got {wrong[0]}, "
            "which is not the client's to choose: leave it out"
        )


def convert(original: Callable[..., Any], self: Any, request: Any, raw_request: Any = None) -> Any:
    """Hook around ``_convert_to_internal_request`` of the OpenAI endpoints: refuse requests that break it."""
    from jinja2 import TemplateError

    try:
        check_template(request)
        return original(self, request, raw_request)
    except Exception as error:
        wrong_template = isinstance(error, TemplateError)
        problem = RequestRefused(f"the chat template: {error}") if wrong_template else explained(error)
        tell_other_server(self.tokenizer_manager, request, problem)
        if problem is error:
            raise
        raise problem from error
