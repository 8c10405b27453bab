from __future__ import annotations

import logging

import pytest

from halfmoon.protocol.log_context import FORMAT, NameRequest, logged
from halfmoon.protocol.trace_context import TraceContext

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"  # the standard's own example


def test_a_traceparent_is_passed_on_as_it_came() -> None:
    found = TraceContext.parse(PARENT)
    assert found == ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", True) and found.header == PARENT
    assert TraceContext.from_metadata((("user-agent", "x"), *found.metadata)) == found
    unsampled = TraceContext.parse(PARENT[:-2] + "00")
    assert unsampled is not None and not unsampled.sampled


@pytest.mark.parametrize(
    "header",
    [None, "", "nonsense", PARENT.upper(), PARENT + "-more", "ff" + PARENT[2:], PARENT.replace("b7ad6b7169203331", "0" * 16)],
)  # fmt: skip
def test_what_is_no_traceparent_begins_no_trace_and_refuses_nothing(header: str | None) -> None:
    assert TraceContext.parse(header) is None


def test_a_later_version_may_bring_more() -> None:
    assert TraceContext.parse("01" + PARENT[2:] + "-what-comes") is not None


def test_every_line_of_a_request_names_it_and_its_trace(capsys: pytest.CaptureFixture[str]) -> None:
    handler, logger = logging.StreamHandler(), logging.getLogger("halfmoon.test_log_context")
    handler.addFilter(NameRequest())
    handler.setFormatter(logging.Formatter(FORMAT))
    logger.addHandler(handler)
    with logged("request-7", TraceContext.parse(PARENT)):
        logger.warning("inside")
    logger.warning("outside")
    logger.removeHandler(handler)
    inside, outside = capsys.readouterr().err.splitlines()
    assert inside.endswith("[request request-7 trace 0af7651916cd43dd8448eb211c80319c] inside")
    assert "request-7" not in outside
