"""What is made of a prompt once: by parts, and for a replay from where it ended."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfmoon.protocol.blocks import block_keys, root_key
from halfmoon.protocol.errors import NoWorker
from halfmoon.protocol.schema import KVSchema
from halfmoon.protocol.v1 import common_pb2, worker_pb2
from halfmoon.proxy.requests import prompt as prompts
from halfmoon.proxy.requests.prompt import Prompt, PromptEncoder, to_wire

SCHEMA = KVSchema(model_fingerprint="m", dtype="float32", num_layers=2, num_kv_heads=2, head_dim=8, block_size=4)
OTHER = KVSchema(model_fingerprint="n", dtype="float32", num_layers=2, num_kv_heads=2, head_dim=8, block_size=8)
tokens = st.lists(st.integers(0, 2**32 - 1), max_size=60)


class FixedCluster:
    def __init__(self, schema: KVSchema | None) -> None:
        self.schema = schema


def encoder(schema: KVSchema | None = SCHEMA) -> tuple[PromptEncoder, Any]:
    cluster: Any = FixedCluster(schema)
    return PromptEncoder(cluster), cluster


def assert_is(prompt: Prompt, token_ids: list[int], schema: KVSchema) -> None:
    keys = block_keys(root_key(schema.fingerprint), token_ids, schema.block_size)
    sequence = common_pb2.SequenceSpec.FromString(prompt.wire)
    assert list(sequence.token_ids) == token_ids and prompt.num_tokens == len(token_ids)
    assert list(prompt.keys) == list(sequence.block_keys) == keys
    assert list(prompt.tail) == token_ids[len(keys) * schema.block_size :]


@given(tokens)
def test_parts_make_what_one_go_makes(token_ids: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "PART_TOKENS", 10)
        parts = encoder()[0].encode_in_parts(token_ids)
        num_parts = 0
        while True:
            try:
                next(parts)
                num_parts += 1
            except StopIteration as done:
                assert_is(done.value, token_ids, SCHEMA)
                break
    assert num_parts == -(-len(token_ids) // 8), "two blocks of four each"


@given(tokens, tokens, tokens)
def test_a_replay_s_prompt_is_as_if_encoded_whole(token_ids: list[int], sent: list[int], more: list[int]) -> None:
    made, _ = encoder()
    first = made.encode(token_ids)
    second = made.extend(first, token_ids, sent)
    assert_is(second, token_ids + sent, SCHEMA)
    assert_is(made.extend(second, token_ids, sent + more), token_ids + sent + more, SCHEMA)
    assert_is(first, token_ids, SCHEMA)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=300), st.text(max_size=20), st.booleans())
def test_a_worker_reads_a_request_with_its_prompt_as_if_it_had_been_merged(token_ids: list[int], request_id: str, local: bool) -> None:
    prompt = encoder()[0].encode(token_ids)
    sequence = common_pb2.SequenceSpec(request_id=request_id, num_prompt_tokens=len(token_ids), deadline_s=3.0)
    expected = worker_pb2.DecodeRequest(sequence=sequence, local_prefill=local, feed_id="feed", call=7)
    read = worker_pb2.DecodeRequest.FromString(to_wire(expected, prompt))
    expected.sequence.token_ids.extend(token_ids)
    expected.sequence.block_keys.extend(prompt.keys)
    assert read == expected


def test_keys_of_another_kv_format_are_made_anew() -> None:
    made, cluster = encoder()
    token_ids = list(range(20))
    prompt = made.encode(token_ids)
    assert made.refreshed(prompt, token_ids) is prompt
    cluster.schema = OTHER
    assert_is(made.refreshed(prompt, token_ids), token_ids, OTHER)
    assert_is(made.extend(prompt, token_ids, [7, 8]), [*token_ids, 7, 8], OTHER)


def test_without_a_worker_nobody_says_what_a_block_is() -> None:
    with pytest.raises(NoWorker):
        encoder(None)[0].encode([1, 2, 3])
