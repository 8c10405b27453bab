"""What a start says about the length of requests, pages and arenas."""

from __future__ import annotations

from halfmoon.deploy.capacity import describe_capacity, served_len
from halfmoon.protocol.v1 import control_pb2

Member = control_pb2.StatusReply.Member


def member(name: str, role: control_pb2.Role, num_tokens: int, max_model_len: int = 0) -> Member:
    info = control_pb2.MemberInfo(id=name, role=role, kv_capacity_tokens=num_tokens, max_model_len=max_model_len)
    return Member(info=info, role=role)


PREFILL = member("prefill-0", control_pb2.ROLE_PREFILL, 4096, 2048)
DECODE = member("decode-0", control_pb2.ROLE_DECODE, 16384, 2048)
SMALL = member("decode-1", control_pb2.ROLE_DECODE, 1024, 1024)
BOTH = member("both-0", control_pb2.ROLE_BOTH, 4096, 2048)
STORE = member("store-0", control_pb2.ROLE_STORE, 8192)
SMALL_STORE = member("store-1", control_pb2.ROLE_STORE, 512)


def test_a_cluster_that_serves_the_model_s_length_says_how_many_tokens_it_holds() -> None:
    length, arena = describe_capacity([PREFILL, DECODE, STORE], 2048)
    assert (length.severity, arena.severity) == ("ok", "ok")
    assert "up to 2048 tokens" in length.what and "store-0 holds 8192 tokens of KV, 4.0 prompts of 2048" in arena.what


def test_pages_that_cap_the_length_are_named_with_their_worker_and_setting() -> None:
    length, _ = describe_capacity([PREFILL, DECODE, SMALL, STORE], 2048)
    assert length.severity == "warning" and served_len([PREFILL, SMALL]) == 1024
    assert "capped at 1024 tokens and not 2048: the pages of decode-1 hold 1024 tokens" in length.what
    assert "decode.kv_capacity_tokens" in length.remedy


def test_an_arena_too_small_for_the_longest_prompt_is_a_fault_only_where_prompts_pass_through_it() -> None:
    for workers, severity in (([PREFILL, DECODE], "fault"), ([DECODE], "ok"), ([BOTH], "ok"), ([BOTH, DECODE], "fault")):
        *_, arena = describe_capacity([*workers, SMALL_STORE], 2048)
        assert arena.severity == severity, workers
    assert (
        "store-1: the KV store's arena is too small for the model: it holds 512 tokens"
        in describe_capacity([PREFILL, DECODE, SMALL_STORE], 0)[1].what
    )
