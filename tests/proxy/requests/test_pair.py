"""What an assigned placement leaves behind at each step of its life."""

from __future__ import annotations

from typing import Any

from halfmoon.proxy.requests.pair import Pair


def assign(bench: Any) -> Pair:
    router, request = bench.router, bench.request(list(range(50, 71)))
    prompt = router._prompts.encode(request.token_ids)
    return router._dispatcher.place(request, prompt, router.decisions.open(request, router._slo_of(request)))


def promised(bench: Any, pair: Pair) -> list[str]:
    return bench.router._index.promised(pair.prompt.keys[-1])


async def test_blocks_stay_promised_once_decode_has_begun_and_not_where_it_never_did(bench: Any) -> None:
    bench.router._index.change(bench.stores[0].address, (), ())
    given_up, decoded = assign(bench), assign(bench)
    given_up.release()
    assert promised(bench, given_up) == [bench.stores[0].address], "the other still promises them"
    decoded.begin_decode()
    decoded.release()
    assert promised(bench, decoded) == [bench.stores[0].address], "they stand there, or the store will say so itself"
    third = assign(bench)
    bench.router._index.withdraw(bench.stores[0].address, third.prompt.keys)
    third.release()
    assert promised(bench, third) == []


async def test_each_step_undoes_its_own_part_and_may_be_taken_twice(bench: Any) -> None:
    bench.router._index.change(bench.stores[0].address, (), ())
    pair, tracker = assign(bench), bench.router._placer.load_tracker
    prefill, decode = pair.prefill, pair.decode
    assert (prefill.backlog.assigned.num_tokens, decode.context.num_tokens, len(tracker.arriving.at_s)) == (21, 21, 1)
    for _ in range(2):
        pair.end_prefill()
    assert (prefill.backlog.assigned.num_tokens, decode.context.num_tokens, len(bench.cluster._table.tasks)) == (0, 21, 0)
    for _ in range(2):
        pair.begin_decode()
    assert (decode.context.num_running, len(tracker.arriving.at_s), len(tracker.began_s)) == (1, 0, 1)
    for _ in range(2):
        pair.release()
    assert (decode.context.num_tokens, decode.context.num_requests, decode.context.num_running) == (0, 0, 0)
    assert tracker.is_idle


async def test_a_prefix_on_its_way_counts_until_the_prefill_is_done(bench: Any) -> None:
    first = assign(bench)
    first.end_prefill()
    bench.router._index.change(bench.stores[0].address, first.prompt.keys, ())
    second, third = assign(bench), assign(bench)
    assert (first.num_loads, second.num_loads, third.num_loads, third.prefill.num_loads) == (0, 0, 1, 2)
    second.end_prefill()
    third.release()
    assert third.prefill.num_loads == 0
    first.release()
    second.release()
