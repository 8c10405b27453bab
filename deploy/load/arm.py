"""An arm: one named server, or several alike, under the same windows as every other arm. Its results are plain values for a JSON file.

warm-up ─► a window for each rate, or a search for the highest that holds ─► {"name", "windows": [{"factor", "summary", "lag", "requests"}]}
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import aiohttp

from ...protocol.errors import ConfigError, Unavailable
from .balancer import Balancer, make_balancer
from .client_lag import client_lag
from .environment import describe_environment
from .goodput import search_goodput
from .plan import Plan, materialise, measured_within
from .sample import Sample
from .sender import Api, Prompts, Sender, SendOptions, open_session
from .server_card import ServerCard, read_card, require_room
from .summary import Slo, attainment, summarise
from .window import Progress, run_window

Notify = Callable[[str, Progress], None]  # (what is being run, how far it is)


class ArmTarget(NamedTuple):
    name: str
    urls: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> ArmTarget:
        """ "vllm=http://a:8000,http://b:8000", or the addresses alone. Raises ConfigError."""
        name, equals, urls = text.partition("=")
        found = tuple(url.strip() for url in (urls if equals else name).split(",") if url.strip())
        if not found or (equals and not name.strip()):
            raise ConfigError(f"{text!r} names no endpoint; write URL, URL,URL or NAME=URL,URL")
        return cls(name.strip() if equals else found[0].removeprefix("http://"), found)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmOptions:
    factors: tuple[float, ...] = (1.0,)
    """Rates, or speeds of a trace."""
    slos: tuple[Slo, ...] = (Slo(2.0, 0.05),)
    balance: str = "prefix_aware"
    vocab_size: int = 2000
    seed: int = 0
    model: str = ""
    api: Api = "completions"
    prompts: Prompts = "tokens"
    timeout_s: float = 600.0
    ignore_eos: bool = True
    extra_body: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    measure_from_s: float = 0.0
    measure_to_s: float = float("inf")
    goodput: bool = False
    """Searches from the first factor on, for the first SLO."""
    by_tail: bool = False
    level: float = 0.9
    tolerance: float = 0.05
    max_probes: int = 12
    budget_s: float = float("inf")
    """A window that would send its last request after this is left out."""

    def __post_init__(self) -> None:
        if not self.factors or min(self.factors) <= 0:
            raise ConfigError(f"rates or speeds are {self.factors}; each must be above 0")
        if not self.slos:
            raise ConfigError("no SLO is given; --slo 2:0.05 is TTFT within 2 s and a token every 50 ms")
        make_balancer(self.balance, 1)

    def within(self, budget_s: float) -> ArmOptions:
        return dataclasses.replace(self, budget_s=budget_s)


class Arm:
    """One target's run. Salts count up from the seed: no window repeats a prompt of an earlier one, and all arms get the same."""

    def __init__(self, target: ArmTarget, plan: Plan, options: ArmOptions, sender: Sender, notify: Notify) -> None:
        self.windows: list[dict[str, Any]] = []
        self.left_out: list[float] = []
        self._target = target
        self._plan = plan
        self._options = options
        self._sender = sender
        self._notify = notify
        self._salt = options.seed * 1000
        self._deadline = time.monotonic() + options.budget_s
        self._balancer: Balancer = make_balancer(options.balance, len(target.urls))

    async def warm_up(self) -> int:
        """Sends the warm-up and drops its results. It uses the first window's salt, so that a trace's prefixes are cached when that begins.

        Raises Unavailable if no request of it succeeded."""
        planned = self._plan.warm_up
        if not planned:
            return 0
        requests = materialise(planned, self._options.factors[0], self._salt, self._options.vocab_size)
        label = f"{self._target.name}: warm-up"
        window = await run_window(requests, self._sender, self._balancer, lambda progress: self._notify(label, progress))
        if not any(sample.outcome in ("ok", "cancelled") for sample in window.samples):
            first = window.samples[0]
            raise Unavailable(
                f"{self._target.name}: no request of the warm-up succeeded; the first ended with {first.outcome}: {first.error}"
            )
        return len(requests)

    async def run(self, factor: float) -> list[Sample] | None:
        """None if the time budget has no room for it."""
        if time.monotonic() + self._plan.span_s / factor >= self._deadline:
            self.left_out.append(factor)
            return None
        options = self._options
        plan = measured_within(self._plan, factor, options.measure_from_s, options.measure_to_s)
        requests = materialise(plan.requests, factor, self._salt, options.vocab_size)
        label = f"{self._target.name}: {plan.kind} {factor:g}"
        window = await run_window(requests, self._sender, self._balancer, lambda progress: self._notify(label, progress))
        summary = summarise(window.samples, options.slos)
        spreads: list[dict[str, float]] = [summary[name] or {} for name in ("ttft_s", "tpot_s")]
        lag = client_lag(window.lag, [sample.late_s for sample in window.samples], *(spread.get("p50") for spread in spreads))
        rows = [sample.as_dict() for sample in window.samples]
        head = {"kind": plan.kind, "factor": factor, "offered_rate": _offered_rate(requests), "salt": self._salt}
        self.windows.append({**head, "summary": summary, "lag": lag, "requests": rows})
        self._salt += 1
        return window.samples

    async def attainment(self, factor: float) -> float | None:
        samples = await self.run(factor)
        return None if samples is None else attainment(samples, self._options.slos[0], tail=self._options.by_tail)


async def run_arm(
    target: ArmTarget,
    plan: Plan,
    options: ArmOptions,
    notify: Notify = lambda label, progress: None,
    *,
    api_key: str = "",
    command: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Raises Unavailable if an endpoint does not answer, ConfigError if it can't take the load."""
    async with open_session() as session:
        cards = [await read_card(session, url, options.model, api_key) for url in target.urls]
        for card in cards:
            require_room(card, plan.requests)
        sender = _sender(session, target, cards, options, api_key)
        arm = Arm(target, plan, options, sender, notify)
        num_warm_up = await arm.warm_up()
        goodput = None
        if options.goodput:
            found = await search_goodput(
                arm.attainment, options.factors[0], level=options.level, tolerance=options.tolerance, max_probes=options.max_probes
            )
            slo = options.slos[0]._asdict()
            goodput = {"kind": plan.kind, "slo": slo, "by_tail": options.by_tail, "level": options.level, **found.as_dict()}
        else:
            for factor in options.factors:
                await arm.run(factor)
    return {
        "name": target.name, "urls": list(target.urls), "servers": [card.as_dict() for card in cards], "command": command,
        "environment": describe_environment(), "plan": plan.description, "options": _plain(options), "num_warm_up": num_warm_up,
        "windows": arm.windows, "left_out": arm.left_out, "goodput": goodput,
    }  # fmt: skip


def _sender(
    session: aiohttp.ClientSession, target: ArmTarget, cards: list[ServerCard], options: ArmOptions, api_key: str
) -> Sender:  # fmt: skip
    send = SendOptions(
        model=cards[0].model, api=options.api, prompts=options.prompts, timeout_s=options.timeout_s, ignore_eos=options.ignore_eos,
        extra_body=options.extra_body, api_key=api_key,
    )  # fmt: skip
    return Sender(session, target.urls, send, run_id=f"bench-{secrets.token_hex(4)}")


def _offered_rate(requests: list[Any]) -> float | None:
    """Requests a second over the window; None for fewer than two requests."""
    return (len(requests) - 1) / requests[-1].due_s if len(requests) > 1 and requests[-1].due_s > 0 else None


def _plain(options: ArmOptions) -> dict[str, Any]:
    plain = dataclasses.asdict(options)
    plain["slos"] = [slo._asdict() for slo in options.slos]
    return {name: None if value == float("inf") else value for name, value in plain.items()}  # JSON has no infinity
