from __future__ import annotations

import math

import numpy as np
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
        ("top_p", 1e-46), ("top_p", 1e-300), ("top_p", 1e-40), ("temperature", 1e39), ("temperature", 1e300), ("min_p", 1e300),
        ("min_p", -1.0), ("repetition_penalty", 0.0), ("repetition_penalty", 1e-38), ("repetition_penalty", 1e-300),
        ("repetition_penalty", 0.009), ("repetition_penalty", 1e300), ("presence_penalty", -1e300),
        ("presence_penalty", 3.0), ("frequency_penalty", math.nan), ("seed", -1),
        ("seed", 2**64), ("max_tokens", 0), ("min_tokens", 17), ("num_logprobs", 21), ("logit_bias", {3: 101.0}),
        ("logit_bias", {3: math.nan}),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.fields["param"] == field
    assert "must be" in caught.value.message


@pytest.mark.parametrize("field", ["temperature", "min_p", "presence_penalty"])
@pytest.mark.parametrize("value", [1e-300, 1e-46, 1e-40])
def test_a_number_that_is_0_to_the_kernels_is_0(field: str, value: float) -> None:
    sampling = SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert getattr(sampling, field) == 0.0
    assert sampling.greedy == (field == "temperature")


@given(st.sampled_from(["temperature", "top_p", "min_p", "repetition_penalty"]), st.floats())
def test_what_is_taken_is_in_range_in_single_precision(field: str, value: float) -> None:
    try:
        taken = getattr(SamplingParams(**{field: value}), field)  # type: ignore[arg-type]
    except InvalidRequest:
        return
    single = float(np.float32(taken))
    assert single == 0.0 or single >= 2.0**-126, "no subnormal, which a device may take for 0"
    assert single > 0.0 or field in ("temperature", "min_p")
    assert math.isfinite(single) and math.isfinite(1.0 / single if single else 0.0)


def test_the_ends_of_the_ranges_are_taken() -> None:
    SamplingParams(temperature=100.0, top_p=1.0, min_p=1.0, repetition_penalty=0.01)
    SamplingParams(temperature=0.0, top_p=1e-37, repetition_penalty=100.0, presence_penalty=-2.0, frequency_penalty=2.0)
