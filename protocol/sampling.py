"""SamplingParams: how the next token is drawn. One validated value from the proxy to both workers."""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from .errors import InvalidRequest
from .grammar import Grammar
from .v1 import common_pb2

MAX_LOGPROBS = 20
MAX_SEED = 2**64 - 1
LEAST_REPETITION_PENALTY = 0.01  # below, a logit divided by it soon leaves fp32
LEAST_NORMAL = 2.0**-126  # of fp32: a device may take a smaller number for 0


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Raises InvalidRequest, naming the field and its limit, where a value is out of range or not a number.

    What is checked is what the kernels use: a number's fp32 value. One that is 0 there is 0 here.
    """

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    num_logprobs: int | None = None  # None: none; k: the sampled token's and the k likeliest
    num_prompt_logprobs: int | None = None  # of the prompt's own tokens, as num_logprobs; no cached prefix is used then
    grammar: Grammar | None = None  # that the answer's text has to match; None: any text

    def __post_init__(self) -> None:
        self._require_range("temperature", 0.0, 100.0)
        self._require_range("top_k", 0, 2**31 - 1)
        self._require_range("top_p", 0.0, 1.0, exclude_low=True)
        self._require_range("min_p", 0.0, 1.0)
        self._require_range("repetition_penalty", LEAST_REPETITION_PENALTY, 100.0)
        self._require_range("presence_penalty", -2.0, 2.0)
        self._require_range("frequency_penalty", -2.0, 2.0)
        self._require_range("seed", 0, MAX_SEED)
        self._require_range("max_tokens", 1, 2**31 - 1)
        self._require_range("min_tokens", 0, self.max_tokens)
        for name in ("num_logprobs", "num_prompt_logprobs"):
            if getattr(self, name) is not None:
                self._require_range(name, 0, MAX_LOGPROBS)
        if self.grammar is not None and self.ignore_eos:
            raise InvalidRequest(
                "ignore_eos can't be asked for with response_format, whose answer ends with its grammar", param="ignore_eos"
            )
        for token_id, bias in self.logit_bias.items():
            if not -100.0 <= bias <= 100.0:
                self._refuse("logit_bias", f"token {token_id} has {bias}", "between -100 and 100")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def needs_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def to_proto(self) -> common_pb2.SamplingParams:
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        if self.grammar is not None:
            values["grammar"] = common_pb2.Grammar(kind=self.grammar.kind, text=self.grammar.text)
        return common_pb2.SamplingParams(**values)

    @classmethod
    def from_proto(cls, message: common_pb2.SamplingParams) -> SamplingParams:
        values = {item.name: getattr(message, item.name) for item in dataclasses.fields(cls)}
        values["stop_token_ids"] = tuple(message.stop_token_ids)
        values["logit_bias"] = dict(message.logit_bias)
        for name in ("num_logprobs", "num_prompt_logprobs"):
            values[name] = getattr(message, name) if message.HasField(name) else None
        values["grammar"] = Grammar(message.grammar.kind, message.grammar.text) if message.HasField("grammar") else None
        return cls(**values)

    def _require_range(self, name: str, low: float, high: float, exclude_low: bool = False) -> None:
        given = getattr(self, name)
        if isinstance(given, float):
            value, low_value = _as_fp32(given), _as_fp32(low)
            if value == 0.0:
                object.__setattr__(self, name, 0.0)
        else:
            value, low_value = given, low
        # written so that NaN, which compares false with everything, is refused
        if not (low_value <= value <= high) or math.isnan(value) or (exclude_low and value == low_value):
            used = f", which is {value} in fp32" if value == 0.0 != given else ""
            limit = f"{'above' if exclude_low else 'at least'} {low} and at most {high}"
            self._refuse(name, f"{name} is {given}{used}", limit)

    def _refuse(self, param: str, found: str, limit: str) -> NoReturn:
        raise InvalidRequest(f"{found}; it must be {limit}", param=param)


def _as_fp32(value: float) -> float:
    """As the kernels see it: rounded, and 0 below the smallest normal number."""
    rounded = ctypes.c_float(value).value
    return rounded if not abs(rounded) < LEAST_NORMAL else 0.0
