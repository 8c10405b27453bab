from __future__ import annotations

import json
import pickle

import grpc
import pytest

from halfmoon.protocol import errors
from halfmoon.protocol.errors import (
    ERROR_TYPES,
    MAX_MESSAGE_LEN,
    HalfmoonError,
    InternalError,
    InvalidRequest,
    Overloaded,
    PromptTooLong,
    build_error,
)


@pytest.mark.parametrize("error_type", ERROR_TYPES.values(), ids=ERROR_TYPES)
def test_an_error_survives_pickling_with_its_fields(error_type: type[HalfmoonError]) -> None:
    error = error_type("what went wrong", limit=3)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is error_type
    assert (copy.message, copy.fields) == (error.message, error.fields)


def test_the_tree_in_the_docstring_is_the_tree_in_the_code() -> None:
    drawn = [line.strip("│├└─ ").split() for line in (errors.__doc__ or "").splitlines() if line.startswith(("├", "│", "└"))]
    assert [words[0] for words in drawn] == [found.__name__ for found in list(ERROR_TYPES.values())[1:]]
    assert [int(words[1]) for words in drawn] == [found.http_status for found in list(ERROR_TYPES.values())[1:]]


def test_codes_are_unique_and_every_error_has_a_grpc_status_that_is_not_ok() -> None:
    assert len({found("x").code for found in ERROR_TYPES.values()}) == len(ERROR_TYPES)
    assert all(found.grpc_status is not grpc.StatusCode.OK for found in ERROR_TYPES.values())


def test_a_code_of_a_newer_version_keeps_its_message() -> None:
    error = build_error("moon_not_up", "too much", json.dumps({"limit": 1}))
    assert type(error) is InternalError
    assert (error.message, error.fields) == ("too much", {"limit": 1})


def test_overloaded_carries_when_to_come_back() -> None:
    error = Overloaded("the queue is full", retry_after_s=2.5)
    copy = build_error(error.code, error.message, error.fields_json)
    assert isinstance(copy, Overloaded)
    assert copy.retry_after_s == 2.5


def test_a_bad_request_is_never_retried_and_a_lost_worker_is() -> None:
    assert not PromptTooLong("x").retryable
    assert errors.WorkerLost("x").retryable and errors.HandoffCorrupt("x").retryable
    assert not errors.NoWorker("x").retryable and not errors.SchemaMismatch("x").retryable


def test_a_message_is_cut_where_it_quotes_something_endless() -> None:
    error = InvalidRequest("x" * 100_000)
    assert len(error.message) <= MAX_MESSAGE_LEN and error.message.endswith("(100000 characters in all)") and str(error) == error.message


@pytest.mark.parametrize("fields_json", ["{", "[]", "7", '"x"', '{"message": "x"}', '{"self": 1}', "[" * 100_000, "null"])
def test_fields_that_are_none_are_refused_in_words(fields_json: str) -> None:
    with pytest.raises(InvalidRequest, match="must be an object"):
        build_error("worker_lost", "gone", fields_json)
