"""The cluster on a virtual clock, around the Conductor that the live proxy runs.

arrival ─► Conductor.place(request, snapshot) ─► prefill instance ─► link ─► decode instance ─► last token
              └─► rejected                          chunk by chunk              └─► rejected once more, where the admission says so
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..proxy.admission import Predictive, create_admission
from ..proxy.conductor import Conductor
from ..proxy.placement import Arriving, MemberState, Placement, PlacementRequest, Rejection, Snapshot
from ..proxy.policies import create_policy
from ..proxy.policies.adaptive import Adaptive
from ..proxy.predictors.timing import Predictors
from ..proxy.prefix_index import PrefixIndex
from ..proxy.urgency import urgency
from .clock import EventLoop
from .instance import Instance, InstanceOptions, Role
from .job import Job
from .links import send
from .node_cache import NodeCache
from .replay import Replay
from .scenario import Failure, Scenario
from .trace import BLOCK_SIZE

Progress = Callable[[int], None]  # requests ended so far


@dataclass(slots=True)
class Counters:
    num_placements: int = 0
    num_role_changes: int = 0
    handoff_bytes: int = 0  # asked to be moved
    prefix_bytes: int = 0
    ssd_bytes: int = 0


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
        self.conductor = Conductor(self.policy, self.admission, self.predictors)
        self.index = PrefixIndex()
        self.counters = Counters()
        self.jobs: list[Job] = []
        self.role_changes: list[tuple[float, str, str]] = []
        self._progress = progress
        self._num_ended = 0
        self._changed: set[Instance] = set()
        self._coming: dict[Job, Arriving] = {}
        self._decoding: dict[Job, float] = {}
        self._parked: list[Job] = []  # for want of a live instance
        self.instances = self._make_instances(scenario)
        self.by_name = {instance.name: instance for instance in self.instances}
        self._states = {instance.name: instance.state() for instance in self.instances}
        self._pools: tuple[tuple[MemberState, ...], tuple[MemberState, ...]] | None = None

    def _make_instances(self, scenario: Scenario) -> list[Instance]:
        options = InstanceOptions(
            page_size=scenario.page_size,
            max_tokens_per_step=scenario.max_tokens_per_step,
            mixed_tokens_per_step=scenario.chunk_tokens,
            step_target_s=self.policy.step_target_s if isinstance(self.policy, Adaptive) and scenario.flexible else 0.0,
            max_running=scenario.max_running,
            learn=scenario.learn,
        )
        cost = scenario.cost
        made: list[Instance] = []
        for number in range(scenario.num_instances):
            name = f"n{number:04d}"
            cache = NodeCache(
                cost.cache_tokens // BLOCK_SIZE,
                lambda stored, evicted, name=name: self.index.change(name, stored, evicted),
                num_ssd_blocks=cost.ssd_tokens // BLOCK_SIZE,
                eviction=scenario.eviction,
            )
            role: Role = "coupled" if scenario.coupled else "prefill" if number < scenario.num_prefill else "decode"
            made.append(Instance(name, role, cost, options, cache, self.loop, self, self.predictors, self._changed.add))
        return made

    # the run

    def run(self, replay: Replay) -> list[Job]:
        """Every request's job, in order of arrival, each ended."""
        for request in replay.requests:
            job = Job(len(self.jobs), request, [block.to_bytes(8, "big") for block in request.full_blocks])
            self.jobs.append(job)
        self._warm(replay)
        for job in self.jobs:
            self.loop.at(job.request.arrival_s, self._arrive, job)
        for failure in self.scenario.failures:
            self.loop.at(failure.at_s, self._fail, failure)
        if isinstance(self.policy, Adaptive) and self.scenario.flexible:
            self.loop.at(0.0, self._rebalance)
        self.loop.run()
        for job in self._parked:
            self._end(job, "rejected_at_arrival", "no live instance was left")
        return self.jobs

    def _warm(self, replay: Replay) -> None:
        """The caches as the requests before the window left them, sessions spread over the nodes that prefill."""
        nodes = [instance for instance in self.instances if instance.role != "decode"]
        for request in replay.warm:
            keys = [block.to_bytes(8, "big") for block in request.full_blocks]
            session = max(request.block_ids[:2])  # the second where there is one: the first may be everybody's
            nodes[session % len(nodes)].cache.keep(keys)

    def _arrive(self, job: Job) -> None:
        self._place(job)

    def _place(self, job: Job) -> None:
        runs = self.index.leading_runs(job.keys)
        request = PlacementRequest(num_tokens=job.num_tokens, held_blocks=runs)
        answer = self.conductor.place(request, self.snapshot())
        self.counters.num_placements += 1
        if isinstance(answer, Rejection):
            if answer.code == "no_worker":
                self._parked.append(job)
                return
            self._end(job, "rejected_at_arrival", answer.reason)
            return
        self._dispatch(job, answer, runs)

    def _dispatch(self, job: Job, placement: Placement, runs: dict[str, int]) -> None:
        scenario, now = self.scenario, self.loop.now
        prefill = self.by_name[placement.prefill.id]
        job.prefill_on = prefill
        job.attempt_cost_s = 0.0
        job.kv_arrived_s = 0.0
        job.prefill_start_s = -1.0
        num_own = runs.get(prefill.name, 0)
        job.fetch_from = ""
        if scenario.remote_prefix and placement.prefix is not None and placement.prefix.num_blocks > num_own:
            job.fetch_from = placement.prefix.store_address
        num_blocks = min(max(num_own, placement.prefix.num_blocks if job.fetch_from and placement.prefix else 0), self._usable(job))
        cached = num_blocks * BLOCK_SIZE
        job.predicted_prefill_s = self.predictors.prefill.predict(job.num_tokens - cached, cached)
        waited_s = now - job.request.arrival_s
        job.predicted_ttft_s = waited_s + placement.ttft_s if placement.ttft_s is not None else -1.0
        decode = prefill if scenario.coupled else self.by_name[placement.decode.id]
        job.decode_on = decode
        self._coming[job] = Arriving(now + (placement.ttft_s or 0.0), job.num_tokens)
        # optimistic: what was placed will be in the cache when who comes behind it starts
        self.index.change(prefill.name, job.keys, ())
        if not (scenario.flexible and prefill is not decode):  # else decode is chosen when the prefill begins
            decode.promise(job, job.num_tokens)
        prefill.add_prefill(job, self._priority(job))

    def _priority(self, job: Job) -> int:
        if self.scenario.order == "fair":
            return 0
        predicted_s = job.predicted_ttft_s if job.predicted_ttft_s >= 0 else None
        return urgency(
            self.scenario.order, arrival_s=job.request.arrival_s, ttft_slo_s=self.scenario.slo.ttft_s, predicted_ttft_s=predicted_s
        )

    def _usable(self, job: Job) -> int:
        return min(len(job.keys), (job.num_tokens - 1) // BLOCK_SIZE)

    # what instances tell

    def load_prefix(self, job: Job) -> tuple[int, float]:
        """Pins what the node holds, fetches what another holds more. Cached tokens, and when they are there."""
        node = job.prefill_on
        assert node is not None
        keys = job.keys[: self._usable(job)]
        run = job.run = node.cache.acquire(keys)
        num_own = len(run.slots) + run.num_ssd
        ready_s = self.loop.now
        num_blocks = num_own
        block_bytes = BLOCK_SIZE * self.scenario.cost.kv_bytes_per_token
        if run.num_ssd:
            num_bytes = run.num_ssd * block_bytes
            self.counters.ssd_bytes += num_bytes
            ready_s += num_bytes / self.scenario.cost.ssd_bytes_per_s
        holder = self.by_name.get(job.fetch_from)
        if holder is not None and not holder.down:
            other = holder.cache.acquire(keys)
            num_other = len(other.slots) + other.num_ssd
            holder.cache.release(other)
            if num_other > num_own:
                num_blocks = num_other
                num_bytes = (num_other - num_own) * block_bytes
                self.counters.prefix_bytes += num_bytes
                arrived_s = send(holder.egress, node.ingress, num_bytes, self.loop.now, self.loop.now)
                ready_s = max(ready_s, arrived_s)
                if self.scenario.learn:
                    self.predictors.transfer.observe(num_bytes, arrived_s - self.loop.now)
        return num_blocks * BLOCK_SIZE, ready_s

    def look_again(self, job: Job) -> int:
        """Cached tokens of a prefill that has not begun: who was before it may have left more here."""
        node = job.prefill_on
        assert node is not None and job.run is not None
        num_slots = len(job.run.slots)
        usable = self._usable(job)
        if num_slots == usable or node.cache.dram.slot(job.keys[num_slots]) is None:
            return job.num_cached_tokens
        run = node.cache.acquire(job.keys[:usable])
        node.cache.release(job.run)
        job.run = run
        return max(job.num_cached_tokens, len(run.slots) * BLOCK_SIZE)

    def prefill_started(self, job: Job) -> None:
        if not self.scenario.flexible or job.prefill_on is job.decode_on:
            return
        assert isinstance(self.policy, Adaptive)
        member, _ = self.policy.select_decode(PlacementRequest(job.num_tokens), self.snapshot())
        job.decode_on = self.by_name[member.id]
        job.decode_on.promise(job, job.num_tokens)

    def chunk_done(self, job: Job, num_tokens: int, start_s: float) -> None:
        if job.decode_on is job.prefill_on:
            return
        assert job.prefill_on is not None and job.decode_on is not None
        if job.kv_arrived_s == 0.0:
            num_tokens += job.num_cached_tokens  # travel with the first chunk
        cost = self.scenario.cost
        num_bytes = num_tokens * cost.kv_bytes_per_token
        self.counters.handoff_bytes += num_bytes
        arrived_s = send(job.prefill_on.egress, job.decode_on.ingress, num_bytes, start_s, self.loop.now, cost.num_layers)
        job.kv_arrived_s = max(job.kv_arrived_s, arrived_s)

    def prefill_done(self, job: Job) -> None:
        assert job.prefill_on is not None and job.decode_on is not None
        node = job.prefill_on
        job.prefill_done_s = self.loop.now
        if job.run is not None:
            node.cache.release(job.run)
            job.run = None
        node.cache.keep(job.keys)
        self._heal(node, job)
        if self.scenario.learn and job.attempt_cost_s > 0:
            new = job.num_tokens - job.num_cached_tokens
            self.predictors.prefill.observe(new, job.num_cached_tokens, job.attempt_cost_s)
        if job.kv_arrived_s > self.loop.now:
            self.loop.at(job.kv_arrived_s, self._handed_off, job, job.attempt)
        else:
            self._handed_off(job, job.attempt)

    def _heal(self, node: Instance, job: Job) -> None:
        """The index knows of the node's cache what was hoped for at the placement; now what is so."""
        absent = [key for key in job.keys if node.cache.dram.slot(key) is None and node.cache.ssd.slot(key) is None]
        if absent:
            self.index.change(node.name, (), absent)

    def _handed_off(self, job: Job, attempt: int) -> None:
        if job.attempt != attempt or job.decode_on is None:  # a failure came in between
            return
        self._coming.pop(job, None)
        if self.admission is not None and self.admission.checks_again and not self.scenario.coupled:
            found = self._judge_again(job)
            if found is not None:
                job.decode_on.unpromise(job)
                job.wasted_prefill_s += job.attempt_cost_s
                self._end(job, "rejected_at_decode", found.reason)
                return
        if self.scenario.keep_on_decode and job.decode_on is not job.prefill_on:
            job.decode_on.cache.keep(job.keys)
        job.decode_on.add_decode(job)

    def _judge_again(self, job: Job) -> Rejection | None:
        """By the step that the decode instance would take now, this request in its batch."""
        assert self.admission is not None and job.decode_on is not None and job.prefill_on is not None
        state = job.decode_on.state()
        step_s = self.predictors.step.predict(state.num_running + 1, state.num_running_tokens + job.num_tokens)
        if step_s <= self.scenario.slo.tbt_s:
            return None
        return Rejection("overloaded", f"{state.id} would step in {step_s * 1e3:.0f} ms with it")

    def decode_started(self, job: Job) -> None:
        if job.first_token_s < 0:
            job.first_token_s = self.loop.now
        job.starts.append(self.loop.now)
        self._decoding[job] = self.loop.now

    def decode_done(self, job: Job) -> None:
        job.done_s = self.loop.now
        began_s = self._decoding.pop(job, None)
        if began_s is not None and isinstance(self.admission, Predictive):
            self.admission.observe_decode(self.loop.now - began_s)
        self._end(job, "done", "")

    def _end(self, job: Job, outcome: str, reason: str) -> None:
        if job.outcome:
            raise AssertionError(f"request {job.index} ends as {outcome}, it had ended as {job.outcome}")
        job.outcome = outcome  # type: ignore[assignment]
        job.reason = reason
        self._coming.pop(job, None)
        self._num_ended += 1
        if self._progress is not None:
            self._progress(self._num_ended)

    # what the conductor sees

    def snapshot(self) -> Snapshot:
        if self._changed:
            for instance in self._changed:
                self._states[instance.name] = instance.state()
            self._changed.clear()
            self._pools = None
        if self._pools is None:
            live = [instance for instance in self.instances if not instance.down]
            states = self._states
            if self.scenario.flexible or self.scenario.coupled:
                everyone = tuple(states[instance.name] for instance in live)
                self._pools = everyone, everyone
            else:
                self._pools = (
                    tuple(states[instance.name] for instance in live if instance.role == "prefill"),
                    tuple(states[instance.name] for instance in live if instance.role == "decode"),
                )
        arriving: tuple[Arriving, ...] = ()
        leaving: tuple[float, ...] = ()
        if isinstance(self.admission, Predictive):
            arriving, leaving = tuple(self._coming.values()), tuple(self._decoding.values())
        return Snapshot(*self._pools, BLOCK_SIZE, self.loop.now, arriving, leaving)

    # roles and failures

    def _rebalance(self) -> None:
        assert isinstance(self.policy, Adaptive)
        for change in self.policy.rebalance(self.snapshot()):
            instance = self.by_name[change.member_id]
            instance.role = change.role
            self._changed.add(instance)
            self.counters.num_role_changes += 1
            self.role_changes.append((self.loop.now, instance.name, change.role))
        if self._num_ended < len(self.jobs):
            self.loop.at(self.loop.now + self.scenario.rebalance_s, self._rebalance)

    def _fail(self, failure: Failure) -> None:
        instance = self.by_name[failure.instance]
        self.index.drop(instance.name)
        instance.cache.clear()
        instance.kill()
        self._pools = None
        lost = [job for job in self.jobs if not job.outcome and self._stands_on(job, instance)]
        for job in lost:
            self._give_up(job, instance)
        for job in lost:
            self._place(job)
        if failure.down_s != float("inf"):
            self.loop.at(self.loop.now + failure.down_s, self._revive, instance)

    def _stands_on(self, job: Job, instance: Instance) -> bool:
        return job.decode_on is instance or (job.prefill_on is instance and job in self._coming)

    def _give_up(self, job: Job, dead: Instance) -> None:
        """Everything of the attempt ends; tokens that were sent stay sent, and are prefilled again."""
        job.attempt += 1
        job.wasted_prefill_s += job.attempt_cost_s
        if job.prefill_on is not None and job.prefill_on is not dead:
            job.prefill_on.withdraw(job)
            if job.run is not None:
                job.prefill_on.cache.release(job.run)
            self._heal(job.prefill_on, job)
        job.run = None
        if job.decode_on is not None:
            job.decode_on.unpromise(job)
        self._coming.pop(job, None)
        self._decoding.pop(job, None)
        job.num_sent_tokens = job.num_output_tokens_sent
        job.prefill_on = job.decode_on = None

    def _revive(self, instance: Instance) -> None:
        instance.revive()
        self._pools = None
        parked, self._parked = self._parked, []
        for job in parked:
            self._place(job)


def simulate(scenario: Scenario, replay: Replay, progress: Progress | None = None) -> Cluster:
    """The cluster after its run; its jobs hold the result. Deterministic: the same scenario and replay give the same floats."""
    cluster = Cluster(scenario, progress)
    cluster.run(replay)
    return cluster


def reasons(jobs: Sequence[Job]) -> dict[str, int]:
    """How many ended in which way."""
    found: dict[str, int] = {}
    for job in jobs:
        found[job.outcome] = found.get(job.outcome, 0) + 1
    return found
