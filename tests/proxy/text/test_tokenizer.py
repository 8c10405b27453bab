"""proxy/text/tokenizer.py and proxy/text/chat_template.py against transformers."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from halfmoon.protocol.errors import CheckpointError, InvalidRequest
from halfmoon.proxy.text.chat_template import ChatMessage, ChatOptions, ChatTemplate
from halfmoon.proxy.text.tokenizer import INLINE_CHARS, Tokenizer

TEXTS = [
    "",
    "Hello, world!",
    "  leading and trailing  ",
    "naïve café — “quotes”\n\tTab",
    "日本語と한국어 and עברית",
    "👩‍👩‍👧‍👦🏳️‍🌈 zero-width joiners",
    "a<|im_end|>b <s>",
    "\u0000\x7f control",
]
CHATS = [
    [ChatMessage("user", "Hi")],
    [
        ChatMessage("system", "Be brief."),
        ChatMessage("user", "2+2?"),
        ChatMessage("assistant", "4"),
        ChatMessage("user", "<b>\"&'</b> 😀\n\n"),
    ],
    [ChatMessage("user", ""), ChatMessage("assistant", "  spaces  "), ChatMessage("user", "日本語")],
]
TEMPLATES = [
    # Llama-2's form: raise_exception, loop.index0, strip
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == (1 if "
    "messages[0].role == 'system' else 0)) and m.role != 'system' %}{{ raise_exception('roles must alternate') }}{% endif %}\n"
    "  {% if m.role == 'user' %}\n[INST] {{ m.content.strip() }} [/INST]\n  {%- else %}"
    "\n {{ m['content'] }}{{ eos_token }}\n  {% endif %}\n{% endfor %}",
    # tojson without HTML escapes, namespace, loop controls, generation tag, tools tested as none
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{% set ns.n = ns.n + 1 %}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}"
    "{{ m | tojson }}{{ m | tojson(indent=2) }}{% endif %}"
    "{% endfor %}{{ ns.n }}{% if tools is not none %}T{% endif %}{% if tools %}T{% endif %}{% if add_generation_prompt %}<go>{% endif %}",
]


@pytest.fixture(scope="module")
def reference(chat_model_folder: Path):
    return AutoTokenizer.from_pretrained(chat_model_folder)


@pytest.mark.parametrize("text", TEXTS)
def test_encoding_equals_that_of_transformers(text: str, chat_tokenizer: Tokenizer, reference) -> None:
    assert chat_tokenizer.encode(text) == reference(text)["input_ids"]
    assert chat_tokenizer.encode(text, add_special_tokens=False) == reference(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_back(text: str, chat_tokenizer: Tokenizer) -> None:
    token_ids = chat_tokenizer.encode(text, add_special_tokens=False)
    assert chat_tokenizer.decode(token_ids, skip_special_tokens=False) == text
    assert b"".join(map(chat_tokenizer.token_bytes, token_ids)) == text.encode()


def test_a_token_of_half_a_character_shows_the_replacement_character(chat_tokenizer: Tokenizer) -> None:
    token_ids = chat_tokenizer.encode("🜚", add_special_tokens=False)
    assert len(token_ids) > 1
    assert chat_tokenizer.token_text(token_ids[0]) == "\ufffd"


@pytest.mark.parametrize("add_bos", [True, False])
def test_tokenizer_json_decides_on_bos_as_in_transformers(add_bos: bool, chat_model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(chat_model_folder, tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": add_bos, "add_eos_token": True}))
    ours, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.encode("Hello") == theirs("Hello")["input_ids"]


@pytest.mark.parametrize("messages", CHATS)
def test_the_models_chat_template_renders_as_in_transformers(messages: list[ChatMessage], chat_tokenizer: Tokenizer, reference) -> None:
    plain = [{"role": message.role, "content": message.content} for message in messages]
    text = chat_tokenizer.render_chat(messages)
    assert text == reference.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    token_ids = reference.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    assert chat_tokenizer.encode(text, add_special_tokens=False) == token_ids


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("source", TEMPLATES)
def test_awkward_templates_render_as_in_transformers(
    source: str, messages: list[ChatMessage], add_generation_prompt: bool, chat_tokenizer: Tokenizer, reference
) -> None:
    ours = ChatTemplate(source, chat_tokenizer.special_tokens).render(messages, ChatOptions(add_generation_prompt))
    plain = [{"role": message.role, "content": message.content} for message in messages]
    assert ours == reference.apply_chat_template(plain, chat_template=source, tokenize=False, add_generation_prompt=add_generation_prompt)


def test_the_date_is_visible_to_a_template() -> None:
    assert len(ChatTemplate("{{ strftime_now('%Y-%m-%d') }}", {}).render([])) == len("2024-01-31")


def test_a_template_that_refuses_the_messages_is_the_clients_error() -> None:
    template = ChatTemplate("{{ raise_exception('system messages are not supported') }}", {})
    with pytest.raises(InvalidRequest, match="system messages are not supported") as caught:
        template.render([ChatMessage("system", "x")])
    assert caught.value.fields["param"] == "messages"


def test_a_template_whose_code_fails_is_a_typed_error() -> None:
    with pytest.raises(InvalidRequest, match="fails on these messages"):
        ChatTemplate("{{ 1 / 0 }}", {}).render([])


@pytest.mark.parametrize(
    "source", ["{{ ''.__class__.__mro__ }}", "{% set ns = namespace() %}{% set ns.__x__ = 1 %}", "{{ messages.append(1) }}"]
)
def test_a_template_cannot_leave_the_sandbox(source: str) -> None:
    with pytest.raises(InvalidRequest):
        ChatTemplate(source, {}).render([ChatMessage("user", "x")])


def test_a_template_that_does_not_parse_is_a_checkpoint_error() -> None:
    with pytest.raises(CheckpointError, match="line 2"):
        ChatTemplate("\n{% for %}", {})


def test_the_template_file_wins_over_the_inline_template(chat_model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(chat_model_folder, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.from_folder(folder).render_chat([]) == "from the file"


def test_of_several_templates_the_default_is_taken(chat_model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(chat_model_folder, tmp_path / "model")
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": templates}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Tokenizer.from_folder(folder).render_chat([]) == "plain"


def test_a_model_without_a_template_says_so(chat_model_folder: Path, tmp_path: Path) -> None:
    shutil.copy(chat_model_folder / "tokenizer.json", tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("Hello, world!") == Tokenizer.from_folder(chat_model_folder).encode("Hello, world!")
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenizer.render_chat([ChatMessage("user", "x")])


def test_a_folder_without_a_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json in") as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(("name", "content"), [("tokenizer.json", "{"), ("tokenizer_config.json", "{"), ("tokenizer_config.json", "[]")])
def test_a_damaged_file_is_named(name: str, content: str, chat_model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(chat_model_folder, tmp_path / "model")
    (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=name):
        Tokenizer.from_folder(folder)


async def test_a_long_prompt_is_tokenised_while_the_event_loop_turns(chat_tokenizer: Tokenizer, loop_gap: Any) -> None:
    text, loop = "The quick brown fox, 日本語 and 😀! " * 20_000, asyncio.get_running_loop()
    began = time.process_time()
    expected = chat_tokenizer.encode(text)
    alone_s, gaps_s = time.process_time() - began, []
    for _ in range(3):
        with loop_gap(loop) as gap:
            found = await chat_tokenizer.encode_aside(text)
        gaps_s.append(gap.longest_s)
        assert found == expected
    assert min(gaps_s) < alone_s / 4, f"{gaps_s} of {alone_s:.3f} s"


async def test_a_long_prompt_is_echoed_while_the_event_loop_turns(chat_tokenizer: Tokenizer, loop_gap: Any) -> None:
    token_ids, loop = chat_tokenizer.encode("The quick brown fox! ", add_special_tokens=False) * 60_000, asyncio.get_running_loop()
    began = time.process_time()
    expected = chat_tokenizer.decode(token_ids)
    alone_s, gaps_s = time.process_time() - began, []
    for _ in range(3):
        with loop_gap(loop) as gap:
            found = await chat_tokenizer.decode_aside(token_ids)
        gaps_s.append(gap.longest_s)
        assert found == expected
    assert min(gaps_s) < alone_s / 2, f"{gaps_s} of {alone_s:.3f} s"


@pytest.mark.parametrize("text", TEXTS)
async def test_texts_that_are_encoded_together_are_encoded_as_each_by_itself(text: str, chat_tokenizer: Tokenizer) -> None:
    long = text + "word " * INLINE_CHARS
    assert await chat_tokenizer.encode_all_aside([long, text]) == [chat_tokenizer.encode(long), chat_tokenizer.encode(text)]
    assert await chat_tokenizer.encode_aside(long, add_special_tokens=False) == chat_tokenizer.encode(long, add_special_tokens=False)
