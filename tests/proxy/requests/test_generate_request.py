"""proxy/requests/generate_request.py: from what was asked to requests, and every limit on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from halfmoon.protocol.config import ModelOptions
from halfmoon.protocol.errors import CheckpointError, InvalidRequest, PromptTooLong, UnknownModel
from halfmoon.protocol.sampling import MAX_SEED
from halfmoon.proxy.model_card import ModelCard
from halfmoon.proxy.request import ProxyRequest
from halfmoon.proxy.requests.generate_request import GenerateRequest, RequestBuilder, salted
from halfmoon.proxy.text.chat_template import ChatMessage
from halfmoon.proxy.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def builder(chat_model_folder: Path, chat_tokenizer: Tokenizer) -> RequestBuilder:
    return RequestBuilder(chat_tokenizer, ModelCard.from_folder(chat_model_folder, ModelOptions(), "float32"), 60.0)


async def build(builder: RequestBuilder, **asked: Any) -> list[ProxyRequest]:
    return await builder.build(GenerateRequest(**{"prompts": ["Hello"], **asked}), 512)


async def test_choices_share_the_prompt_and_differ_by_seed(builder: RequestBuilder) -> None:
    found = await build(builder, prompts=["Hello", [5, 6]], n=3, seed=MAX_SEED - 1, request_id="r", sampling={"top_k": 4})
    assert [request.request_id for request in found] == [f"r-{index}" for index in range(6)]
    assert [request.sampling.seed for request in found] == [MAX_SEED - 1, MAX_SEED, 0] * 2
    assert [request.token_ids for request in found[3:]] == [[5, 6]] * 3
    assert all(request.sampling.top_k == 4 and request.timeout_s == 60.0 for request in found)
    assert all(request.token_ids is found[index // 3 * 3].token_ids for index, request in enumerate(found)), "one list a prompt"


async def test_without_a_seed_one_is_drawn_for_all_choices(builder: RequestBuilder) -> None:
    first, second = [(await build(builder, n=2)) for _ in range(2)]
    assert first[1].sampling.seed == first[0].sampling.seed + 1
    assert first[0].sampling.seed != second[0].sampling.seed
    assert first[0].request_id != second[0].request_id


async def test_one_choice_has_the_request_id_itself_and_the_arrival_of_the_ask(builder: RequestBuilder) -> None:
    asked = GenerateRequest(prompts=["Hello"], request_id="mine")
    (request,) = await builder.build(asked, 512)
    assert (request.request_id, request.arrival) == ("mine", asked.arrival)


async def test_a_chat_is_not_given_a_second_bos(builder: RequestBuilder, chat_tokenizer: Tokenizer) -> None:
    (request,) = await builder.build(GenerateRequest(messages=[ChatMessage("user", "x")]), 512)
    assert chat_tokenizer.decode(request.token_ids, skip_special_tokens=False).startswith("<|im_start|>user")


@pytest.mark.parametrize(("num_tokens", "max_tokens"), [(500, 12), (496, 16), (511, 1), (3, 16)])
async def test_the_default_of_16_tokens_shrinks_to_what_is_left(num_tokens: int, max_tokens: int, builder: RequestBuilder) -> None:
    (request,) = await build(builder, prompts=[[7] * num_tokens])
    assert request.sampling.max_tokens == max_tokens


async def test_the_limit_itself_is_allowed(builder: RequestBuilder) -> None:
    (request,) = await build(builder, prompts=[[7] * 500], max_tokens=12)
    assert request.sampling.max_tokens == 12


@pytest.mark.parametrize(
    ("ask", "error", "param", "message"),
    [
        ({"prompts": [[7] * 512]}, PromptTooLong, "prompt", "512 tokens and may have 511"),
        ({"prompts": [[7] * 500], "max_tokens": 13}, PromptTooLong, "max_tokens", "may be 12"),
        ({"prompts": [], "messages": [ChatMessage("user", "日" * 600)]}, PromptTooLong, "messages", "length is 512"),
        ({"model": "other"}, UnknownModel, "model", "'chatty' is"),
        ({"prompts": [[2**32]]}, InvalidRequest, "prompt", "token id 4294967296"),
        ({"timeout_s": float("nan")}, InvalidRequest, "timeout_s", "nan"),
        ({"timeout_s": 0.0}, InvalidRequest, "timeout_s", "above 0"),
        ({"label": "a\nb"}, InvalidRequest, "request_id", "printable"),
        ({"label": "x" * 129}, InvalidRequest, "request_id", "128"),
        ({"sampling": {"min_tokens": 17}}, InvalidRequest, "min_tokens", "at most 16"),
        ({"sampling": {"temperature": float("nan")}}, InvalidRequest, "temperature", "nan"),
        ({"sampling": {"logit_bias": {1: float("nan")}}}, InvalidRequest, "logit_bias", "nan"),
        ({"stop": ["a"] * 17}, InvalidRequest, "stop", "17 strings; it may have 16"),
        ({"stop": ["a", "b" * 1025]}, InvalidRequest, "stop", "a string of 1025 characters; each may have 1024"),
        ({"timeout_s": 604801.0}, InvalidRequest, "timeout_s", r"604801\.0; it must be .* at most 604800 \(7 days\)"),
        ({"timeout_s": 1e18}, InvalidRequest, "timeout_s", "7 days"),
        ({"timeout_s": float("inf")}, InvalidRequest, "timeout_s", "7 days"),
        ({"prompts": ["a"] * 65, "n": 32}, InvalidRequest, "prompt", "65 prompts with n 32 are 2080 choices; a request may have 2048"),
        ({"n": 129}, InvalidRequest, "n", "at most 128"),
    ],
)
async def test_what_is_out_of_range_is_named_with_its_limit(
    ask: dict[str, Any], error: type[InvalidRequest], param: str, message: str, builder: RequestBuilder
) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        await build(builder, **ask)
    assert type(caught.value) is error and caught.value.fields["param"] == param


@pytest.mark.parametrize("ask", [{"prompts": ["a", "b" * 10**6]}, {"prompts": [], "messages": [ChatMessage("user", "b" * 10**6)]}])
async def test_a_text_that_no_prompt_can_be_is_refused_before_it_is_tokenised(
    ask: dict[str, Any], builder: RequestBuilder, chat_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 512 * 4 * max(len(token) for token in chat_tokenizer._backend.get_vocab(with_added_tokens=True))
    encoded: list[str] = []
    encode = Tokenizer.encode_all_aside

    async def seen(self: Tokenizer, texts: list[str], **options: bool) -> list[list[int]]:
        encoded.extend(texts)
        return await encode(self, texts, **options)

    monkeypatch.setattr(Tokenizer, "encode_all_aside", seen)
    with pytest.raises(PromptTooLong, match=f"at most {limit} characters; the prompt has 1000000 characters"):
        await build(builder, **ask)
    assert encoded == []
    with pytest.raises(PromptTooLong, match="tokens and may have 511"):
        await build(builder, prompts=["b" * limit])  # as long as the limit: its tokens decide
    assert encoded == ["b" * limit]


async def test_the_longest_timeout_is_taken_and_a_longer_default_is_cut_to_it(chat_model_folder: Path, chat_tokenizer: Tokenizer) -> None:
    patient = RequestBuilder(chat_tokenizer, ModelCard.from_folder(chat_model_folder, ModelOptions(), "float32"), 1e18)
    asked, default = [(await build(patient, timeout_s=timeout_s))[0].timeout_s for timeout_s in (604800.0, None)]
    assert asked == default == 604800.0


def test_the_card_names_the_model_after_its_folder_or_the_option(chat_model_folder: Path) -> None:
    card = ModelCard.from_folder(chat_model_folder, ModelOptions(), "float32")
    assert (card.name, card.max_model_len, card.eos_token_ids) == ("chatty", 512, frozenset({1}))
    card = ModelCard.from_folder(chat_model_folder, ModelOptions(name="mine", max_model_len=100), "float32")
    assert (card.name, card.max_model_len) == ("mine", 100)


async def test_a_stop_string_that_is_a_special_token_stops_at_the_token(builder: RequestBuilder, chat_tokenizer: Tokenizer) -> None:
    (request,) = await build(builder, stop=["<|im_end|>", "fox", "<|im_end|>!"], sampling={"stop_token_ids": (9,)})
    assert request.sampling.stop_token_ids == (9, chat_tokenizer.special_token_id("<|im_end|>"))


async def test_requests_end_at_eos_tokens_that_workers_do_not_know_unless_they_ignore_eos(
    chat_model_folder: Path, chat_tokenizer: Tokenizer
) -> None:
    card = ModelCard("m", 512, 400, frozenset({1, 3}), "float32", other_eos_token_ids=frozenset({3}))
    builder = RequestBuilder(chat_tokenizer, card, 60.0)
    assert (await build(builder))[0].sampling.stop_token_ids == (3,)
    assert (await build(builder, sampling={"ignore_eos": True, "stop_token_ids": (5,)}))[0].sampling.stop_token_ids == (5,)


async def test_a_request_is_sampled_as_the_model_recommends_but_for_what_it_says_itself(chat_tokenizer: Tokenizer) -> None:
    card = ModelCard("m", 512, 400, frozenset({1}), "float32", sampling={"temperature": 0.7, "top_k": 20})
    (request,) = await build(RequestBuilder(chat_tokenizer, card, 60.0), sampling={"top_k": 0})
    assert (request.sampling.temperature, request.sampling.top_k, request.sampling.top_p) == (0.7, 0, 1.0)


@pytest.mark.parametrize("content", [None, "{}", '{"vocab_size": "many", "max_position_embeddings": 4}'])
def test_a_folder_without_limits_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelCard.from_folder(tmp_path, ModelOptions(), "float32")


def test_two_tenants_with_one_cache_salt_share_no_prefix() -> None:
    salts = [salted(tenant, cache_salt) for tenant in (b"", b"a" * 32, b"b" * 32) for cache_salt in ("", "x")]
    assert len(set(salts)) == 6 and salts[0] == b""
