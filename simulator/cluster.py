"""The cluster on a virtual clock, around the Conductor that the live proxy runs.

arrival ─► Conductor.place(request, snapshot) ─► prefill instance ─► link ─► decode instance ─► last token
              └─► rejected                          chunk by chunk              └─► rejected once more, where the admission says so
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from functools import partial

from ..protocol.errors import ConfigError
from ..proxy.conductor.admission import create_admission
from ..proxy.conductor.assigned_load import AssignedLoad
from ..proxy.conductor.backlog import Backlog, QueuePlace
from ..proxy.conductor.conductor import Conductor
from ..proxy.conductor.forecast import handoff_bytes, handoff_link
from ..proxy.conductor.placement import Arriving, Placement, PlacementRequest, Rejection, Snapshot
from ..proxy.conductor.policies import create_policy
from ..proxy.conductor.policies.base import RolePlanner, known_blocks, rebalance
from ..proxy.conductor.predictors.timing import Predictors
from ..proxy.conductor.predictors.waiting import step_with
from ..proxy.conductor.queue_order import TICKS_PER_S, first_token_due_s, queue_order
from ..proxy.prefixes.index import PrefixIndex
from .clock import EventLoop
from .cluster_view import ClusterView
from .counters import Counters
from .instance import Instance
from .instance_options import InstanceOptions, Role
from .job import Job, Outcome
from .links import send
from .node_cache import NodeCache
from .prefixes import Prefixes
from .processor import Processor
from .replay import Replay
from .scenario import Failure, Scenario

Progress = Callable[[int], None]  # requests ended so far


class Cluster:
    """run() once."""

    def __init__(self, scenario: Scenario, progress: Progress | None = None) -> None:
        self.scenario = scenario
        self.loop = EventLoop()
        self.predictors = Predictors(scenario.knows or scenario.cost)
        self.policy = create_policy(
            scenario.policy,
            random.Random(scenario.seed),
            self.predictors,
            slo=scenario.slo,
            balancing_threshold=scenario.balancing_threshold,
        )
        self.admission = create_admission(scenario.admission, scenario.slo, self.predictors)
        self.roles = self.policy.roles if scenario.flexible else None
        self.conductor = Conductor(self.policy, self.admission, self.predictors)
        self.index = PrefixIndex()
        self.counters = Counters()
        self.prefixes = Prefixes(scenario, self.loop, self.index, self.predictors, self.counters)
        wants_arrivals = self.admission is not None and self.admission.wants_arrivals
        self.view = ClusterView(scenario.flexible or scenario.coupled, scenario.block_size, wants_arrivals, scenario.report_s)
        self.jobs: list[Job] = []
        self.role_changes: list[tuple[float, str, str]] = []
        self._progress = progress
        self._num_ended = 0
        self._parked: list[Job] = []  # for want of a live instance
        self.instances = self._make_instances(scenario)
        self.by_name = self.prefixes.by_name = {instance.name: instance for instance in self.instances}
        self.view.watch(self.instances)

    def _make_instances(self, scenario: Scenario) -> list[Instance]:
        options = InstanceOptions(
            page_size=scenario.page_size,
            block_size=scenario.block_size,
            max_tokens_per_step=scenario.max_tokens_per_step,
            chunk_tokens=scenario.chunk_tokens,
            tpot_s=scenario.slo.tpot_s if math.isfinite(scenario.slo.tpot_s) else scenario.tpot_target_s,
            knows=(scenario.knows or scenario.cost).step_cost,
            max_running=scenario.max_running,
            step_jitter=scenario.step_jitter,
            learn=scenario.learn,
        )
        made: list[Instance] = []
        shared = self._make_cache("node"), Processor(scenario.cost.num_cores)
        for number in range(scenario.num_instances):
            name = f"n{number:04d}"
            role: Role = "coupled" if scenario.coupled else "prefill" if number < scenario.num_prefill else "decode"
            node = "node" if scenario.one_node else name
            cache, processor = shared if scenario.one_node else (self._make_cache(name), Processor())
            owners = self.loop, self, self.predictors, self.view.change
            books = Backlog(AssignedLoad(), shares=scenario.order == "fair" and role != "decode", table=self.view.tasks, row=number)
            made.append(Instance(name, role, scenario.cost, options, cache, *owners, node=node, processor=processor, books=books))
        return made

    def _make_cache(self, node: str) -> NodeCache:
        scenario = self.scenario
        return NodeCache(
            scenario.cost.cache_tokens // scenario.block_size,
            partial(self.index.change, node),
            num_ssd_blocks=scenario.cost.ssd_tokens // scenario.block_size,
            eviction=scenario.eviction,
        )

    # the run

    def run(self, replay: Replay) -> list[Job]:
        """Every request's job, in order of arrival, each ended. Raises ConfigError for a failure of an instance that there is not."""
        for request in replay.requests:
            self.jobs.append(Job(len(self.jobs), request, self.prefixes.keys(request)))
        self.prefixes.warm(replay.warm)
        for job in self.jobs:
            self.loop.at(job.request.arrival_s, self._place, job)
        for failure in self.scenario.failures:
            if failure.instance not in self.by_name:
                raise ConfigError(
                    f"no instance {failure.instance!r} can fail; there are {self.instances[0].name} to {self.instances[-1].name}"
                )
            self.loop.at(failure.at_s, self._fail, failure)
        if self.roles is not None:
            self.loop.at(0.0, self._rebalance, self.roles)
        self.loop.run()
        for job in self._parked:
            self._end(job, "rejected_at_arrival", "no live instance was left")
        return self.jobs

    def snapshot(self) -> Snapshot:
        return self.view.snapshot(self.loop.now)

    def _place(self, job: Job) -> None:
        """As the proxy's Placer does it: one that is late even so is placed again as one that gives way."""
        runs, scenario = self.index.leading_runs(job.keys), self.scenario
        on_ssd, in_pages = self.index.ssd_runs(job.keys, runs), self.prefixes.in_pages(job)
        waited_s = self.loop.now - job.request.arrival_s
        request = PlacementRequest(
            job.num_tokens, runs, slo=scenario.slo, waited_s=waited_s, admitted=job.attempt > 1, page_blocks=in_pages, ssd_blocks=on_ssd
        )
        request = self.conductor.weigh(request, scenario.block_size)
        num_cached = known_blocks(request, scenario.block_size) * scenario.block_size
        work_s = self.predictors.prefill.predict(job.num_tokens - num_cached, num_cached)
        due_s = self._due_s(job, work_s)
        request, seen, answer = self._ask(request, QueuePlace(self._order(job, work_s), due_s), work_s)
        late = isinstance(answer, Placement) and waited_s + (answer.ttft_s or 0.0) > scenario.slo.ttft_s
        if late and scenario.order == "late":
            order = self._order(job, work_s, waited_s + (answer.ttft_s or 0.0))
            request, seen, answer = self._ask(request, QueuePlace(order, due_s), work_s)
        self.counters.num_placements += 1
        self.conductor.observe_arrival(request, seen, answer)
        if isinstance(answer, Rejection):
            if answer.code == "no_worker":
                self._parked.append(job)
                return
            self._end(job, "rejected_at_arrival", answer.reason)
            return
        self._dispatch(job, request, answer)

    def _ask(self, request: PlacementRequest, place: QueuePlace, work_s: float) -> tuple[PlacementRequest, Snapshot, Placement | Rejection]:
        """The request with its place in the queue."""
        passed_until_s = -math.inf if self.scenario.order == "fair" else place.queue_order / TICKS_PER_S
        request = dataclasses.replace(request, place=place, passed_until_s=passed_until_s)
        seen = self.view.snapshot(self.loop.now, place, work_s)
        return request, seen, self.conductor.place(request, seen)

    def _order(self, job: Job, work_s: float, predicted_ttft_s: float | None = None) -> int:
        """predicted_ttft_s: from the arrival."""
        scenario = self.scenario
        if scenario.order == "fair":
            return 0
        arrival_s, slo_s = job.request.arrival_s, scenario.slo.ttft_s
        return queue_order(scenario.order, arrival_s=arrival_s, ttft_slo_s=slo_s, predicted_ttft_s=predicted_ttft_s, work_s=work_s)

    def _dispatch(self, job: Job, request: PlacementRequest, placement: Placement) -> None:
        scenario, now = self.scenario, self.loop.now
        prefill = self.by_name[placement.prefill.id]
        job.prefill_on = prefill.name
        job.attempt_cost_s = 0.0
        job.kv_arrived_s = 0.0
        job.prefill_start_s = -1.0
        num_own = request.held_blocks.get(prefill.node, 0)
        job.left_on_ssd = frozenset(node for node, verdict in placement.ssd_verdicts.items() if not verdict.loads)
        job.fetch_from = ""
        if scenario.remote_prefix and placement.prefix is not None and placement.prefix.num_blocks > num_own:
            job.fetch_from = placement.prefix.store_address
        num_elsewhere = placement.prefix.num_blocks if job.fetch_from and placement.prefix else 0
        cached = min(max(num_own, num_elsewhere), self.prefixes.usable(job)) * scenario.block_size
        job.predicted_prefill_s = self.predictors.prefill.predict(job.num_tokens - cached, cached)
        waited_s = now - job.request.arrival_s
        job.predicted_ttft_s = waited_s + placement.ttft_s if placement.ttft_s is not None else -1.0
        job.promised_ttft_s = waited_s + placement.promised_ttft_s if placement.promised_ttft_s is not None else -1.0
        job.exposed_s = placement.exposed_s
        decode = prefill if scenario.coupled else self.by_name[placement.decode.id]
        job.decode_on = decode.name
        job.handoff = 0, ""
        if prefill is not decode:
            num_bytes = handoff_bytes(self.predictors, request, placement.decode, scenario.block_size, placement.num_cached_tokens)
            job.handoff = num_bytes, handoff_link(placement.prefill, placement.decode)
        self.view.coming[job] = Arriving(now + (placement.ttft_s or 0.0), job.num_tokens)
        self.prefixes.hope(prefill, job)
        if self.roles is None or prefill is decode:  # else decode is chosen when the prefill begins
            decode.promise(job, job.num_tokens)
        prefill.add_prefill(job, request.place, cached)
        for instance in {prefill, decode}:
            self.view.placed_on(instance)

    def _due_s(self, job: Job, work_s: float) -> float:
        if self.scenario.order == "fair" or job.num_sent_tokens:
            return math.inf
        return first_token_due_s(
            self.scenario.order,
            arrival_s=job.request.arrival_s,
            ttft_slo_s=self.scenario.slo.ttft_s,
            work_s=work_s,
        )

    # what instances tell

    def load_prefix(self, job: Job) -> tuple[int, float]:
        return self.prefixes.load(job)

    def look_again(self, job: Job) -> int:
        return self.prefixes.look_again(job)

    def prefill_started(self, job: Job) -> None:
        if self.roles is None or job.prefill_on == job.decode_on:
            return
        member, _ = self.roles.select_decode(PlacementRequest(job.num_tokens), self.snapshot())
        job.decode_on = member.id
        self.by_name[member.id].promise(job, job.num_tokens)

    def chunk_done(self, job: Job, num_tokens: int, start_s: float) -> None:
        if job.decode_on == job.prefill_on:
            return
        source, target = self.by_name[job.prefill_on], self.by_name[job.decode_on]
        if job.kv_arrived_s == 0.0 and source.node != target.node:
            num_tokens += job.num_cached_tokens  # travel with the first chunk
        cost = self.scenario.cost
        num_bytes = num_tokens * cost.kv_bytes_per_token
        self.counters.handoff_bytes += num_bytes
        arrived_s = send(source.egress, target.ingress, num_bytes, start_s, self.loop.now, cost.num_layers)
        job.kv_arrived_s = max(job.kv_arrived_s, arrived_s)

    def prefill_done(self, job: Job) -> None:
        node = self.by_name[job.prefill_on]
        job.prefill_done_s = self.loop.now
        self.prefixes.cached(node, job)
        if self.scenario.learn and job.attempt_cost_s > 0 and job.decode_on != job.prefill_on:
            new = job.num_tokens - job.num_cached_tokens
            self.predictors.prefill.observe(new, job.num_cached_tokens, job.attempt_cost_s)
        there_s = max(job.kv_arrived_s, self.loop.now) + self.scenario.cost.request_s * node.processor.slowdown
        if there_s > self.loop.now:
            self.loop.at(there_s, self._handed_off, job, job.attempt)
        else:
            self._handed_off(job, job.attempt)

    def _handed_off(self, job: Job, attempt: int) -> None:
        if job.attempt != attempt or not job.decode_on:  # a failure came in between
            return
        self.view.coming.pop(job, None)
        decode = self.by_name[job.decode_on]
        if self.admission is not None and self.admission.checks_again and not self.scenario.coupled:
            found = self._judge_again(job, decode)
            if found is not None:
                decode.unpromise(job)
                job.wasted_prefill_s += job.attempt_cost_s
                self._end(job, "rejected_at_decode", found.reason)
                return
        if self.scenario.cache_on_decode and job.decode_on != job.prefill_on:
            decode.cache.insert(job.keys)
        decode.add_decode(job)

    def _judge_again(self, job: Job, decode: Instance) -> Rejection | None:
        """By the step that the decode instance would take now, this request in its batch."""
        step_s = step_with(self.predictors, decode.state(), job.num_tokens)
        if step_s <= self.scenario.slo.tpot_s:
            return None
        return Rejection("overloaded", f"{decode.name} would step in {step_s * 1e3:.0f} ms with it")

    def decode_started(self, job: Job) -> None:
        if job.first_token_s < 0:
            job.first_token_s = self.loop.now
            (num_bytes, link), took_s = job.handoff, self.loop.now - job.prefill_done_s
            if self.scenario.learn and num_bytes and took_s > 0.0:
                self.predictors.handoff.observe(num_bytes, took_s, link)
            if self.scenario.learn and job.predicted_ttft_s > 0.0 and job.attempt == 1:
                self.predictors.promise.observe(job.exposed_s, job.predicted_ttft_s, self.loop.now - job.request.arrival_s)
        job.starts.append(self.loop.now)
        self.view.decoding[job] = self.loop.now

    def decode_done(self, job: Job) -> None:
        job.done_s = self.loop.now
        self.prefixes.keep_pages(self.by_name[job.decode_on], job)
        began_s = self.view.decoding.pop(job, None)
        if began_s is not None and self.admission is not None:
            self.admission.observe_decode(self.loop.now - began_s, job.num_tokens)
        if self.roles is not None:
            self.roles.observe_end(job.request.num_output_tokens)
        self._end(job, "done", "")

    def _end(self, job: Job, outcome: Outcome, reason: str) -> None:
        if job.outcome:
            raise AssertionError(f"request {job.index} ends as {outcome}, it had ended as {job.outcome}")
        job.outcome = outcome
        job.reason = reason
        self.view.coming.pop(job, None)
        self._num_ended += 1
        if self._progress is not None:
            self._progress(self._num_ended)

    # roles and failures

    def _rebalance(self, roles: RolePlanner) -> None:
        for change in rebalance(roles, self.snapshot()):
            self.loop.at(self.loop.now + self.scenario.role_change_s, self._take_role, self.by_name[change.member_id], change.role)
        if self._num_ended < len(self.jobs):
            self.loop.at(self.loop.now + self.scenario.rebalance_s, self._rebalance, roles)

    def _take_role(self, instance: Instance, role: Role) -> None:
        """What it has it keeps. One that died meanwhile has the role when it is back."""
        if instance.role == role:
            return
        instance.role = role
        self.view.placed_on(instance)
        self.counters.num_role_changes += 1
        self.role_changes.append((self.loop.now, instance.name, role))

    def _fail(self, failure: Failure) -> None:
        instance = self.by_name[failure.instance]
        if instance.node == instance.name:  # its node dies with it
            self.prefixes.lose(instance)
        instance.kill()
        self.view.change_members()
        lost = [job for job in self.jobs if not job.outcome and self._stands_on(job, instance.name)]
        for job in lost:
            self._abort(job, instance)
        for job in lost:
            self._place(job)
        if failure.down_s != float("inf"):
            self.loop.at(self.loop.now + failure.down_s, self._revive, instance)

    def _stands_on(self, job: Job, name: str) -> bool:
        return job.decode_on == name or (job.prefill_on == name and job in self.view.coming)

    def _abort(self, job: Job, dead: Instance) -> None:
        """Everything of the attempt ends; tokens that were sent stay sent, and are prefilled again."""
        job.attempt += 1
        job.wasted_prefill_s += job.attempt_cost_s
        prefill = self.by_name.get(job.prefill_on)
        if prefill is not None and prefill is not dead:
            prefill.withdraw(job)
            self.prefixes.unpin(prefill, job)
            self.prefixes.heal(prefill, job)
        job.run = None
        if job.decode_on:
            self.by_name[job.decode_on].unpromise(job)
        self.view.coming.pop(job, None)
        self.view.decoding.pop(job, None)
        job.num_sent_tokens = job.num_output_tokens_sent
        job.prefill_on = job.decode_on = ""

    def _revive(self, instance: Instance) -> None:
        instance.revive()
        self.view.change_members()
        parked, self._parked = self._parked, []
        for job in parked:
            self._place(job)


def simulate(scenario: Scenario, replay: Replay, progress: Progress | None = None) -> Cluster:
    """The cluster after its run; its jobs hold the result. Deterministic: the same scenario and replay give the same floats."""
    cluster = Cluster(scenario, progress)
    cluster.run(replay)
    return cluster
