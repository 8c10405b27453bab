"""All that `halfmoon doctor` looks at, in the order in which one fault explains the next; the worst comes first in the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...client import Control, PhaseRecord, Usage
from ...protocol.config import ClusterConfig
from ...protocol.errors import HalfmoonError
from ..capacity import describe_capacity, read_status, served_len
from ..checks.before_start import StartChecks
from ..checks.finding import Finding, ok, run_check, worst_first
from .environment import look_at_environment
from .links import Link, measure_links
from .members import check_member_ports, look_at_members
from .pages import check_clocks, check_prefill_traffic, read_pages
from .probe import send_probe


@dataclass(frozen=True, slots=True)
class Report:
    findings: list[Finding]
    """The worst first."""
    links: list[Link]
    phases: PhaseRecord | None
    """Of the probe request."""
    usage: Usage | None

    @property
    def is_well(self) -> bool:
        return all(found.severity in ("ok", "warning") for found in self.findings)

    def as_dict(self) -> dict[str, Any]:
        return {
            "well": self.is_well,
            "findings": [found.as_dict() for found in self.findings],
            "links": [link.as_dict() for link in self.links],
            "phases": None if self.phases is None else self.phases.as_dict(),
        }


def examine_machine(config: ClusterConfig) -> Report:
    """This machine and a model folder, as `halfmoon serve` would find them."""
    found: list[Finding] = []
    for check in StartChecks(config).all():
        finding = run_check(check)
        if all(one.what != finding.what for one in found):  # what needs the model fails with the model's own error
            found.append(finding)
    return Report(worst_first(found + look_at_environment()), [], None, None)


async def examine_cluster(address: str, control: Control, api_key: str = "", authority: bytes | None = None) -> Report:
    """A running cluster, from this machine. address: "host:port" of the proxy's gRPC face."""
    try:
        status = await read_status(control)
    except HalfmoonError as error:
        gone = Finding(
            "proxy", "fault", f"no proxy answers: {error.message}", "start one with halfmoon serve, or check --proxy", error.code
        )
        return Report(worst_first([gone, *look_at_environment()]), [], None, None)
    found = [ok("proxy", f"{status.model} at {address}, {len(status.members)} members, policy {status.policy}"), *look_at_members(status)]
    links, of_links = await measure_links(status.members, control.credentials)
    pages = await read_pages(status.members, control.credentials)
    found += [*of_links, *describe_capacity(status.members, 0), check_prefill_traffic(status, pages)]
    found += [*await check_member_ports(status.members), *check_clocks(pages)]
    probe = await send_probe(address, served_len(status.members), api_key, authority)
    found += [probe.finding, *look_at_environment()]
    return Report(worst_first(found), links, probe.phases, probe.usage)
