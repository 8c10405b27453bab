"""Takes a prompt to an assigned pair of members, and judges the pair again when its prefill is done.

Prompt ─► Placer ─► Placement ─► Assigner ─► Pair ─► judge_again, when its prefill is done ─► finished
                └─► Rejection ─► NoWorker | PromptTooLong | Overloaded
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from ...protocol.errors import HalfmoonError, Overloaded, build_error
from ..conductor.placement import Placement, Rejection, come_back
from ..conductor.predictors.waiting import step_with
from ..metrics import ProxyMetrics
from ..request import ProxyRequest
from .assigner import Assigner
from .decisions import AttemptDecision, RequestDecision
from .pair import Pair
from .placer import Placer
from .prompt import Prompt, PromptEncoder


class Dispatcher:
    def __init__(self, prompts: PromptEncoder, placer: Placer, assigner: Assigner, metrics: ProxyMetrics) -> None:
        self._prompts = prompts
        self._placer = placer
        self._assigner = assigner
        self._metrics = metrics

    def place(self, request: ProxyRequest, prompt: Prompt, decision: RequestDecision) -> Pair:
        """Raises NoWorker, PromptTooLong, Overloaded."""
        prompt = self._prompts.refreshed(prompt, request.token_ids)
        return self._assign(self._placer.place(request, prompt, decision), prompt)

    def place_again(
        self,
        request: ProxyRequest,
        sent: Sequence[int],
        failed: Pair,
        decision: RequestDecision,
        exclude: frozenset[str],
        avoid: frozenset[str],
    ) -> Pair:
        """For a request whose pair failed it. sent: all the tokens sent so far.

        It keeps its queue order, and no SLO keeps it out. exclude, avoid: incarnations. Raises NoWorker, PromptTooLong.
        """
        prompt = self._prompts.extend(failed.prompt, request.token_ids, sent)
        return self._assign(self._placer.place_again(request, prompt, decision, failed.queue_order, exclude, avoid), prompt)

    def judge_again(self, pair: Pair) -> Overloaded | None:
        """Called when the prefill is done. An error if the decode worker's step, at its present load, would miss the request's SLO.

        None also for replays, and if the admission does not check twice.
        """
        admission, asked = self._placer.admission, pair.decided.asked
        if admission is None or not admission.checks_again or asked.admitted or asked.slo is None or pair.is_local:
            return None
        predictors, state, limit_s = self._placer.learner.predictors, pair.decode.state, asked.slo.tpot_s
        step_s = step_with(predictors, state, pair.num_tokens)
        if step_s <= limit_s:
            return None
        retry_after_s = self._placer.load_tracker.fits_in_s(predictors.step, state, step_s, limit_s, time.monotonic())
        self._metrics.rejected(admission.name, "overloaded")
        return Overloaded(
            f"its prefill is done, and {state.id} would now step in {step_s * 1e3:.0f} ms with it, the SLO is {limit_s * 1e3:g} ms; "
            f"its blocks stay cached: {come_back(retry_after_s)}",
            retry_after_s=retry_after_s,
        )

    def finished(self, pair: Pair, num_output_tokens: int) -> None:
        """The pair's request has finished by itself."""
        seconds, admission = self._placer.load_tracker.finished(pair, time.monotonic()), self._placer.admission
        if (roles := self._placer.conductor.policy.roles) is not None:
            roles.observe_end(num_output_tokens)
        if seconds is not None and admission is not None:
            admission.observe_decode(seconds, pair.num_tokens)

    def _assign(self, decided: AttemptDecision, prompt: Prompt) -> Pair:
        answer = decided.answer
        if isinstance(answer, Rejection):
            raise self._refused(answer)
        self._metrics.placed(self._placer.conductor.policy.name, _kind(answer))
        lacks_store = decided.seen.max_handoff_len < decided.asked.num_tokens
        if answer.is_local and (lacks_store or self._metrics.members.lacks_prefill):
            self._metrics.fell_back("local_prefill")
        return self._assigner.assign(answer, decided, prompt)

    def _refused(self, answer: Rejection) -> HalfmoonError:
        admission = self._placer.admission
        if answer.code != "overloaded" or admission is None:
            self._metrics.rejected("conductor", answer.code)
            return build_error(answer.code, answer.reason)
        self._metrics.rejected(admission.name, answer.code)
        return Overloaded(answer.reason, retry_after_s=answer.retry_after_s)


def _kind(placement: Placement) -> str:
    if placement.is_local:
        return "local"
    if placement.prefix is not None:
        return "remote_prefix"
    return "own_prefix" if placement.num_cached_tokens else "no_prefix"
