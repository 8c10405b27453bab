"""openapi.json, and schemathesis over it: whatever it sends, the answer is one that the page says, and none is a fault of the server's."""

from __future__ import annotations

import os
import re
from typing import Any

import httpx
import hypothesis
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.generation import GenerationMode

load_all_checks()
NUM_CASES = 8
"""For each operation. Thousands go by hand: HALFMOON_FUZZ_CASES."""
NAMES = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
)
FUZZED = hypothesis.settings(
    max_examples=int(os.environ.get("HALFMOON_FUZZ_CASES", NUM_CASES)),
    derandomize="HALFMOON_FUZZ_CASES" not in os.environ,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


def operations(face: Any, mode: GenerationMode) -> list[Any]:
    """Each of them once at least; what has nothing to draw can't be asked wrongly."""
    schema: Any = schemathesis.openapi.from_url(f"{face.http}/openapi.json")
    found = [operation.ok() for operation in schema.get_all_operations()]
    return [one for one in found if one.body or mode is GenerationMode.POSITIVE]


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_whatever_is_asked_gets_an_answer_that_openapi_json_says(mode: GenerationMode, face: Any, caplog: pytest.LogCaptureFixture) -> None:
    checks = [CHECKS.get_one(name) for name in NAMES]
    num_cases = 0
    with requests.Session() as session:
        for operation in operations(face, mode):

            @FUZZED
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                nonlocal num_cases
                num_cases += 1
                case.call_and_validate(checks=checks, session=session)

            ask()
    assert num_cases >= NUM_CASES
    print(f"{num_cases} cases")
    assert httpx.get(f"{face.http}/health").status_code == 200
    assert [record.getMessage() for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")] == []


ASKED: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/responses": {"input": "x"},
}


@pytest.mark.parametrize("path", ASKED)
def test_the_events_of_a_stream_are_as_openapi_json_says(path: str, face: Any) -> None:
    schema: Any = schemathesis.openapi.from_url(f"{face.http}/openapi.json")
    case = schema[path]["POST"].Case(body={**ASKED[path], "stream": True}, media_type="application/json")
    response = case.call_and_validate(checks=[CHECKS.get_one(name) for name in NAMES])
    assert response.content.decode().endswith("data: [DONE]\n\n") == (path != "/v1/responses")


def test_every_status_and_the_event_stream_are_described(face: Any) -> None:
    schema = httpx.get(f"{face.http}/openapi.json").json()
    for path in ASKED:
        found = schema["paths"][path]["post"]["responses"]
        assert set(found) == {"200", "400", "404", "405", "408", "413", "415", "429", "431", "500", "503", "504"}
        assert set(found["200"]["content"]) == {"application/json", "text/event-stream"}
    assert not re.search("422|HTTPValidationError", str(schema))
