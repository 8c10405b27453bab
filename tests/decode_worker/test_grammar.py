"""Answers held to grammars, by a model of random weights: prefill worker ─► hand-off ─► decode worker. jsonschema is the judge."""

from __future__ import annotations

import asyncio
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from transformers import LlamaForCausalLM

from halfmoon.protocol.errors import InvalidRequest
from halfmoon.protocol.grammar import Grammar
from halfmoon.protocol.v1 import common_pb2

EOS = 2
PIECES = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ", '{"', '":', '",', '"}', "true", "null", "[]", "Ġ1", "aĊ", "Ã", "©", "ĉ"]
FIRST = 10  # id of the first piece
BYTES = {"Ġ": b" ", "Ċ": b"\n", "ĉ": b"\t", "Ã": b"\xc3", "©": b"\xa9"}
"""Of the characters that stand for a byte other than their own."""
TEXTS = {FIRST + index: b"".join(BYTES.get(char, char.encode()) for char in piece) for index, piece in enumerate(PIECES)}
CLOSING = {token_id: 4.0 for token_id, text in TEXTS.items() if text[-1:] in (b'"', b"}", b"]")} | {EOS: 12.0}
"""Logit biases, without which a random model would seldom end a text."""
PROMPT = [FIRST + index for index in range(20)]
WITH_PREFIX = [FIRST + index for index in range(37)]


@pytest.fixture(scope="session")
def speaking_model(model: tuple[Path, LlamaForCausalLM], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a tokenizer of printable characters and a few longer tokens."""
    folder = tmp_path_factory.mktemp("speaking") / "tiny"
    shutil.copytree(model[0], folder)
    tokenizer = {
        "model": {"type": "BPE", "vocab": {piece: FIRST + index for index, piece in enumerate(PIECES)}},
        "added_tokens": [{"id": EOS, "content": "</s>", "special": True}],
        "decoder": {"type": "ByteLevel"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture
async def speaking(speaking_model: Path, make_cluster: Any) -> Any:
    return await make_cluster(folder=speaking_model)


def text_of(token_ids: list[int]) -> str:
    return b"".join(TEXTS[token_id] for token_id in token_ids if token_id != EOS).decode()


def asked(grammar: Grammar, seed: int = 0, **more: Any) -> dict[str, Any]:
    sampling = {"temperature": 1.0, "seed": seed, "ignore_eos": False, "max_tokens": 200, "logit_bias": CLOSING, "grammar": grammar}
    return sampling | more


async def answered(run: Any, prompt: list[int], **sampling: Any) -> list[int]:
    """The tokens of a whole answer, the first among them."""
    answer = await run(prompt, **sampling)
    assert answer.finished.reason == common_pb2.FINISH_REASON_STOP, text_of(tokens_of(answer))
    return tokens_of(answer)


def tokens_of(answer: Any) -> list[int]:
    first = answer.admitted.state.first_token.token_id
    return (
        answer.token_ids
        if answer.token_ids[:1] == [first] and answer.finished.num_tokens == len(answer.token_ids)
        else [first, *answer.token_ids]
    )


@pytest.mark.parametrize("way", ["handed off", "local"])
async def test_every_answer_is_valid_by_its_schema(speaking: Any, schemas: Any, drawn_schemas: Any, way: str) -> None:
    run = speaking.run if way == "handed off" else speaking.run_local
    if way == "handed off":
        schemas = schemas | drawn_schemas
        assert len(schemas) >= 200

    async def check(number: int, name: str, schema: dict[str, Any]) -> None:
        tokens = await answered(run, PROMPT, **asked(Grammar.of_schema(schema), number))
        try:
            jsonschema.Draft202012Validator(schema).validate(json.loads(text_of(tokens)))
        except (ValueError, jsonschema.ValidationError) as error:
            raise AssertionError(f"{name}: {text_of(tokens)!r} is not valid") from error

    await asyncio.gather(*(check(number, name, schema) for number, (name, schema) in enumerate(schemas.items())))


async def test_any_json_object_a_regex_a_choice_and_ebnf(speaking: Any) -> None:
    tokens = await answered(speaking.run, PROMPT, **asked(Grammar("json_object")))
    assert isinstance(json.loads(text_of(tokens)), dict)
    tokens = await answered(speaking.run, PROMPT, **asked(Grammar("regex", "[a-c]{2,5}@[0-9]{3}")))
    assert re.fullmatch("[a-c]{2,5}@[0-9]{3}", text_of(tokens))
    tokens = await answered(speaking.run, PROMPT, **asked(Grammar.of_choices(['y"es', "no", "may\nbe"])))
    assert text_of(tokens) in ('y"es', "no", "may\nbe")
    tokens = await answered(speaking.run, PROMPT, **asked(Grammar("ebnf", 'root ::= "<" [a-z]{1,3} ">" root | "."')))
    assert re.fullmatch("(<[a-z]{1,3}>)*[.]", text_of(tokens))


async def test_a_replay_goes_on_where_the_answer_stood_and_draws_the_same_tokens(speaking: Any, schemas: Any) -> None:
    sampling = asked(Grammar.of_schema(schemas["steps"]), 3)
    whole = await answered(speaking.run, PROMPT, **sampling)
    for num_sent in random.Random(0).sample(range(1, len(whole) - 1), 6):
        for run in (speaking.run, speaking.run_local):
            rest = await answered(run, PROMPT + whole[:num_sent], num_prompt_tokens=len(PROMPT), **sampling)
            assert whole[:num_sent] + rest == whole


async def test_an_object_whose_decode_worker_dies_half_way_is_ended_by_another_with_the_same_tokens(
    speaking: Any, drawn_schemas: Any
) -> None:
    schemas = [schema for schema in drawn_schemas.values() if schema.get("required")][:5]
    wholes, dying, sent = [], [], list[list[int]]()
    for number, schema in enumerate(schemas):
        sampling = asked(Grammar.of_schema(schema), number)
        wholes.append(await answered(speaking.run, PROMPT, **sampling))
        sequence = speaking.sequence(PROMPT, **sampling)
        call, _ = speaking.start_decode(sequence), await speaking.start_prefill(sequence)
        answer = speaking.answer()
        async for reply in call:
            if reply.WhichOneof("event") == "admitted":
                answer.admitted = reply.admitted
                break
        sent.append([answer.admitted.state.first_token.token_id])
        dying.append(call)
    await speaking.add_decode()
    dead = speaking.workers.pop(1)
    await dead.stop(0.0)
    for number, (schema, whole, tokens) in enumerate(zip(schemas, wholes, sent, strict=True)):
        given = whole[: max(1, len(whole) // 2)]  # as far as a proxy may have sent
        assert given[:1] == tokens
        rest = await answered(speaking.run, PROMPT + given, num_prompt_tokens=len(PROMPT), **asked(Grammar.of_schema(schema), number))
        assert given + rest == whole
        jsonschema.Draft202012Validator(schema).validate(json.loads(text_of(whole)))


async def test_a_hit_on_a_cached_prefix_changes_no_token(speaking: Any, schemas: Any, drawn_schemas: Any) -> None:
    for number, schema in enumerate([schemas["event"], *list(drawn_schemas.values())[:6]]):
        sampling = asked(Grammar.of_schema(schema), number)
        first = await answered(speaking.run, WITH_PREFIX, **sampling)
        again = await speaking.run(WITH_PREFIX, **sampling)
        assert again.admitted.state.num_cached_tokens > 0 and tokens_of(again) == first


async def test_a_batch_with_and_without_grammars_gives_what_each_gives_alone(speaking: Any, schemas: Any) -> None:
    free = {"temperature": 1.0, "seed": 9, "max_tokens": 30}
    held = asked(Grammar.of_schema(schemas["contact"]), 4, num_logprobs=2)
    alone = [(await speaking.run(PROMPT, **sampling)).token_ids for sampling in (free, held)]
    together = await asyncio.gather(*(speaking.run(PROMPT, **sampling) for sampling in (free, held, free)))
    assert [answer.token_ids for answer in together] == [alone[0], alone[1], alone[0]]
    assert all(len(token.top_logprobs) == 2 for token in together[1].tokens)


async def test_min_tokens_delays_the_end_and_the_grammar_s_end_comes_first(speaking: Any) -> None:
    tokens = await answered(speaking.run, PROMPT, **asked(Grammar("regex", "[ab]{1,40}"), min_tokens=10))
    assert len(text_of(tokens)) >= 10
    tokens = await answered(speaking.run, PROMPT, **asked(Grammar("regex", "[ab]{3}"), min_tokens=20))
    assert re.fullmatch("[ab]{3}", text_of(tokens))


async def test_an_answer_cut_by_max_tokens_says_so(speaking: Any) -> None:
    answer = await speaking.run(PROMPT, **asked(Grammar("regex", "[ab]{40}"), max_tokens=5))
    assert answer.finished.reason == common_pb2.FINISH_REASON_LENGTH and re.fullmatch("[ab]{5}", text_of(tokens_of(answer)))


async def test_a_preempted_answer_stays_within_its_grammar(speaking_model: Path, make_cluster: Any) -> None:
    few = await make_cluster(folder=speaking_model, decode={"kv_capacity_tokens": 96})
    schema = {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 4, "maxItems": 6}
    answers = await asyncio.gather(*(few.run(PROMPT, **asked(Grammar.of_schema(schema), seed, max_tokens=70)) for seed in range(4)))
    assert sum(answer.finished.phases.num_preemptions for answer in answers) > 0
    for answer in answers:
        jsonschema.validate(json.loads(text_of(tokens_of(answer))), schema)


@pytest.mark.parametrize("way", ["handed off", "local"])
async def test_a_grammar_that_does_not_compile_is_refused_before_any_work(speaking: Any, way: str) -> None:
    sequence = speaking.sequence(PROMPT, **asked(Grammar("regex", "([")))
    calls = [speaking.start_decode(sequence, local=way == "local"), *([] if way == "local" else [speaking.start_prefill(sequence)])]
    errors = await asyncio.gather(*(speaking.error_of(call) for call in calls))
    assert any(isinstance(error, InvalidRequest) and "Unclosed" in error.message for error in errors)
    await speaking.at_rest()
    answer = await speaking.run(PROMPT, temperature=0.0, max_tokens=2)
    assert len(tokens_of(answer)) == 2
