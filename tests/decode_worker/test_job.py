"""What a DecodeJob sends, and when."""

from __future__ import annotations

import asyncio

import pytest

from halfmoon.decode_worker.job import DecodeJob
from halfmoon.decode_worker.token_feed import TokenFeed
from halfmoon.engine.sequence import Sequence
from halfmoon.protocol.errors import WorkerLost
from halfmoon.protocol.sampling import SamplingParams
from halfmoon.protocol.v1 import common_pb2, worker_pb2


@pytest.fixture
async def job() -> DecodeJob:
    loop = asyncio.get_running_loop()
    return DecodeJob(worker_pb2.DecodeRequest(), Sequence("r", [1], 1, SamplingParams()), [], loop.create_future())


def admit(job: DecodeJob) -> None:
    job.admit(common_pb2.HandoffState(num_tokens=1, first_token=common_pb2.TokenOutput(token_id=4)))


async def test_tokens_that_wait_to_be_sent_go_in_one_message(job: DecodeJob) -> None:
    admit(job)
    for token_id in (5, 6):
        job.push(common_pb2.TokenOutput(token_id=token_id))
    job.finish_reason = common_pb2.FINISH_REASON_LENGTH
    job.let_finish()
    replies = [reply async for reply in job.replies()]
    assert [reply.WhichOneof("event") for reply in replies] == ["admitted", "tokens", "finished"]
    assert [token.token_id for token in replies[1].tokens.tokens] == [4, 5, 6]


async def test_tokens_do_not_wait_for_the_end_that_is_held_back(job: DecodeJob) -> None:
    admit(job)
    job.push(common_pb2.TokenOutput(token_id=5))
    job.finish_reason = common_pb2.FINISH_REASON_LENGTH
    replies = job.replies()
    assert [(await anext(replies)).WhichOneof("event") for _ in range(2)] == ["admitted", "tokens"]
    end = asyncio.ensure_future(anext(replies))
    await asyncio.sleep(0)
    assert not end.done()
    job.let_finish()
    assert (await end).WhichOneof("event") == "finished"


async def test_tokens_that_come_while_a_message_is_written_are_sent_before_the_end(job: DecodeJob) -> None:
    admit(job)
    seen: list[int] = []
    with pytest.raises(WorkerLost):
        async for reply in job.replies():
            seen += [token.token_id for token in reply.tokens.tokens]
            if seen == [4]:
                job.push(common_pb2.TokenOutput(token_id=5))
                job.error = WorkerLost("gone")
    assert seen == [4, 5]


async def test_with_a_feed_the_call_itself_carries_the_first_token_and_the_number_of_all() -> None:
    feed = TokenFeed("f")
    request = worker_pb2.DecodeRequest(feed_id="f", call=7)
    job = DecodeJob(request, Sequence("r", [1], 1, SamplingParams()), [], asyncio.get_running_loop().create_future(), feed)
    admit(job)
    for token_id in (5, 6):
        job.push(common_pb2.TokenOutput(token_id=token_id))
    job.finish_reason = common_pb2.FINISH_REASON_LENGTH
    job.let_finish()
    admitted, finished = [reply async for reply in job.replies()]
    assert admitted.admitted.state.first_token.token_id == 4 and finished.finished.num_tokens == 3
    step = await feed.next_step()
    assert step is not None and (list(step.calls), list(step.token_ids)) == ([7, 7], [5, 6])
