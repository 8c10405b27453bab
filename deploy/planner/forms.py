"""The forms that a number of instances can take: all coupled, a fixed split, or roles that follow the load."""

from __future__ import annotations

from typing import Literal, NamedTuple

from ...simulator.scenario import Scenario

Kind = Literal["coupled", "split", "adaptive"]


class Form(NamedTuple):
    kind: Kind
    num_prefill: int  # instances; 0 unless it is a split
    num_decode: int

    @property
    def num_instances(self) -> int:
        return self.num_prefill + self.num_decode

    @property
    def title(self) -> str:
        if self.kind == "split":
            return f"{self.num_prefill}P{self.num_decode}D"
        return f"{self.num_instances} {self.kind}"

    def scenario(self, base: Scenario) -> Scenario:
        if self.kind == "adaptive":
            half = self.num_instances // 2
            return base.with_(policy="adaptive", num_prefill=half, num_decode=self.num_instances - half)
        coupled = self.kind == "coupled"
        return base.with_(policy="kvcache_centric", coupled=coupled, num_prefill=self.num_prefill, num_decode=self.num_decode)

    def command(self, slo_flags: str) -> str:
        """That starts it."""
        if self.kind == "coupled":
            return f"halfmoon serve --prefill 0 --decode {self.num_instances} --policy kvcache_centric {slo_flags}"
        if self.kind == "adaptive":
            return f"halfmoon serve --both {self.num_instances} --policy adaptive {slo_flags}"
        return f"halfmoon serve --prefill {self.num_prefill} --decode {self.num_decode} --policy kvcache_centric {slo_flags}"


def coupled(num: int) -> Form:
    return Form("coupled", 0, num)


def adaptive(num: int) -> Form:
    return Form("adaptive", 0, num)


def split(num_prefill: int, num: int) -> Form:
    return Form("split", num_prefill, num - num_prefill)


def neighbours(form: Form) -> list[Form]:
    """Splits with one prefill instance less, and one more."""
    num = form.num_instances
    return [split(near, num) for near in (form.num_prefill - 1, form.num_prefill + 1) if 0 < near < num]
