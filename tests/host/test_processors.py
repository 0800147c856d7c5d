"""A logit processor that the scheduler could not load is refused where the request enters."""

import json

import pytest

pytestmark = pytest.mark.usefixtures("imported")


@pytest.mark.parametrize(
    "text",
    [
        "nonsense", "{}", 5, json.dumps({"callable": "zz"}), json.dumps({"callable": "00"}),
        json.dumps({"callable": "8004950500000000000000 8c 01 61 94 2e".replace(" ", "")}),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_is_refused(text: object) -> None:
    from sglang_tpla.host.requests.edge import check_processor
    from sglang_tpla.host.requests.fields import RequestRefused

    with pytest.raises(RequestRefused, match="to_str"):
        check_processor(text)


def test_sglangs_own_is_loaded() -> None:
    from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor

    from sglang_tpla.host.requests.edge import check_processor

    check_processor(DisallowedTokensLogitsProcessor.to_str())
