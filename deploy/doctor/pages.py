"""What members' /metrics pages tell: who computes prompts, and whether their clocks agree with ours."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from ...protocol.credentials import Credentials
from ...protocol.v1 import control_pb2
from ..checks.finding import Finding, ok
from ..page_opener import PageOpener, page_opener

TIMEOUT_S = 3.0
MAX_SKEW_S = 2.0  # a page's date has whole seconds


class Page(NamedTuple):
    member_id: str
    text: str
    skew_s: float | None  # of the member's clock, ahead of ours


async def read_pages(members: Sequence[control_pb2.StatusReply.Member], credentials: Credentials) -> list[Page]:
    """Of all members that can be reached. credentials: of the cluster, whose pages have TLS where members have."""
    opener = page_opener(None if credentials.tls is None else credentials.tls.authority, credentials.token)
    infos = [member.info for member in members if member.info.metrics_address]
    read = await asyncio.gather(*(asyncio.to_thread(_read, opener, info.id, info.metrics_address) for info in infos))
    return [page for page in read if page is not None]


def _read(opener: PageOpener, member_id: str, address: str) -> Page | None:
    try:
        with opener(f"{address}/metrics", TIMEOUT_S) as reply:
            date, text = reply.headers.get("Date"), reply.read().decode()
    except OSError:
        return None  # check_member_ports names it
    return Page(member_id, text, parsedate_to_datetime(date).timestamp() + 0.5 - time.time() if date else None)


def check_clocks(pages: Sequence[Page]) -> list[Finding]:
    """Durations travel between members and never times, so that a wrong clock harms logs and traces alone."""
    found = [
        Finding(
            "clocks",
            "warning",
            f"the clock of {page.member_id}'s machine is {abs(page.skew_s):.0f} s {'ahead of' if page.skew_s > 0 else 'behind'} ours: "
            "logs and traces of one request do not fit together",
            "run an NTP client on both machines",
        )
        for page in pages
        if page.skew_s is not None and abs(page.skew_s) > MAX_SKEW_S
    ]
    return found or [ok("clocks", f"those of {len(pages)} members agree with ours to {MAX_SKEW_S:g} s")]


def check_prefill_traffic(status: control_pb2.StatusReply, pages: Sequence[Page]) -> Finding:
    """Whether workers that are there to prefill do."""
    prefill = {one.info.id for one in status.members if one.role == control_pb2.ROLE_PREFILL}
    if not prefill:
        return ok("prefill", "no worker is for prefill alone: decode workers compute prompts")
    seen = [page for page in pages if page.member_id in prefill]
    num_done, num_tokens = status.outcomes["done"], sum(num_prompt_tokens(page.text) for page in seen)
    if num_done and len(seen) == len(prefill) and not num_tokens:
        return Finding(
            "prefill",
            "slow",
            f"zero prefill traffic: {num_done} requests have ended, and {', '.join(sorted(prefill))} computed none of their prompts; "
            "decode workers compute them all",
            "set proxy.local_prefill to 'fallback'; `halfmoon explain` of a request says why it went where it went",
        )
    return ok("prefill", f"{num_tokens:.0f} prompt tokens were computed by {len(seen)} of {len(prefill)} prefill workers")


def num_prompt_tokens(text: str) -> float:
    """Prompt tokens that the process of a metrics page has computed, in any role."""
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return sum(one.value for one in samples if one.name == "halfmoon_step_tokens_total" and one.labels.get("role") == "prefill")
