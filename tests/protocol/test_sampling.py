from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfmoon.protocol.errors import InvalidRequest
from halfmoon.protocol.sampling import SamplingParams

params = st.builds(
    SamplingParams,
    temperature=st.floats(0, 2),
    top_k=st.integers(0, 1000),
    top_p=st.floats(0.01, 1),
    seed=st.integers(0, 2**64 - 1),
    max_tokens=st.integers(1, 1000),
    stop_token_ids=st.lists(st.integers(0, 2**31)).map(tuple),
    logit_bias=st.dictionaries(st.integers(0, 2**31), st.floats(-100, 100), max_size=3),
    num_logprobs=st.none() | st.integers(0, 20),
)


@given(params)
def test_parameters_cross_a_wire_unchanged(sampling: SamplingParams) -> None:
    assert SamplingParams.from_proto(type(sampling.to_proto()).FromString(sampling.to_proto().SerializeToString())) == sampling


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", math.nan), ("temperature", -0.1), ("temperature", math.inf), ("top_p", 0.0), ("top_p", 1.5), ("top_p", math.nan),
        ("min_p", -1.0), ("repetition_penalty", 0.0), ("presence_penalty", 3.0), ("frequency_penalty", math.nan), ("seed", -1),
        ("seed", 2**64), ("max_tokens", 0), ("min_tokens", 17), ("num_logprobs", 21), ("logit_bias", {3: 101.0}),
        ("logit_bias", {3: math.nan}),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.fields["param"] == field
    assert "must be" in caught.value.message
