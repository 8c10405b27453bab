"""Every field of OpenAI's three generating requests and of vLLM's extensions, and what becomes of it. A test sends each.

python -m halfmoon.proxy.openai.conformance: docs/conformance.md, made from this table. A test compares what is committed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"
Standing = Literal["served", "ignored", "refused"]
Route = Literal["both", "completions", "chat", "responses"]
NO_BODY: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Row:
    """One field. value: as a test sends it, where it asks for something. beside: fields that it makes sense with."""

    name: str
    standing: Standing
    value: Any
    route: Route = "both"
    note: str = ""
    beside: Mapping[str, Any] = field(default_factory=lambda: NO_BODY)


_STREAM = {"stream": True, "stream_options": {}}
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
OPENAI = (
    Row("model", "served", "chatty", note="another than the served one is `model_not_found`"),
    Row("prompt", "served", "Once upon", "completions", "a text, several, token ids, or several of these"),
    Row("messages", "served", [{"role": "user", "content": "Once upon"}], "chat", "parts of type `text` alone"),
    Row("best_of", "refused", 2, "completions", "but for the value of `n`"),
    Row("echo", "served", True, "completions"),
    Row("frequency_penalty", "served", 0.5),
    Row("logit_bias", "served", {"9": 5}),
    Row("logprobs", "served", 2, "completions", "at most 20; with `echo` of the prompt, too"),
    Row("logprobs", "served", True, "chat"),
    Row("top_logprobs", "served", 2, "chat", "at most 20", {"logprobs": True}),
    Row("max_tokens", "served", 3, note="0 with `echo` or `prompt_logprobs`"),
    Row("max_completion_tokens", "served", 3, "chat"),
    Row("n", "served", 2),
    Row("presence_penalty", "served", 0.5),
    Row("response_format", "served", {"type": "json_object"}, "chat"),
    Row("reasoning_effort", "served", "high", "chat", "a variable of the model's chat template"),
    Row("seed", "served", 5),
    Row("stop", "served", ["fox"], note="at most 16"),
    Row("stream", "served", True),
    Row("stream_options", "served", {"include_usage": True}, beside=_STREAM),
    Row("stream_options.include_usage", "served", True, beside=_STREAM),
    Row("stream_options.include_obfuscation", "ignored", True, note="no padding is sent", beside=_STREAM),
    Row("suffix", "refused", "the end", "completions"),
    Row("temperature", "served", 0.5),
    Row("top_p", "served", 0.5),
    Row("tools", "served", [_TOOL], "chat", "functions alone, no `custom` tools; where the model has a [tool parser](tools.md)"),
    Row("tool_choice", "served", "required", "chat", "`allowed_tools` too; but for `custom` tools", beside={"tools": [_TOOL]}),
    Row("parallel_tool_calls", "served", False, "chat", beside={"tools": [_TOOL], "tool_choice": "required"}),
    Row("functions", "refused", [{"name": "f"}], "chat"),
    Row("function_call", "refused", {"name": "f"}, "chat", "but for `none` and `auto`"),
    Row("audio", "refused", {"voice": "ash", "format": "wav"}, "chat"),
    Row("modalities", "refused", ["text", "audio"], "chat", "but for `text` alone"),
    Row("moderation", "refused", {"model": "omni"}, "chat"),
    Row("web_search_options", "refused", {"search_context_size": "low"}, "chat"),
    Row("metadata", "ignored", {"a": "b"}, "chat", "nothing is stored"),
    Row("store", "ignored", True, "chat", "nothing is stored"),
    Row("prediction", "ignored", {"type": "content", "content": "x"}, "chat", "a hint for speed"),
    Row("prompt_cache_key", "ignored", "a", "chat", "prefixes are shared wherever they are alike; see `cache_salt`"),
    Row("prompt_cache_options", "ignored", {"mode": "implicit"}, "chat"),
    Row("prompt_cache_retention", "ignored", "24h", "chat"),
    Row("safety_identifier", "ignored", "a", "chat"),
    Row("service_tier", "ignored", "flex", "chat", "a reply says `default`"),
    Row("user", "ignored", "a"),
    Row("verbosity", "ignored", "low", "chat"),
)
VLLM = (
    Row("top_k", "served", 5, note="0 and -1: all tokens"),
    Row("min_p", "served", 0.1),
    Row("repetition_penalty", "served", 1.1),
    Row("min_tokens", "served", 2),
    Row("ignore_eos", "served", True),
    Row("stop_token_ids", "served", [50]),
    Row("include_stop_str_in_output", "served", True, beside={"stop": ["fox"]}),
    Row("skip_special_tokens", "served", False),
    Row("spaces_between_special_tokens", "ignored", False),
    Row("bad_words", "served", ["."], note="words of one token"),
    Row("truncate_prompt_tokens", "served", 2),
    Row("prompt_logprobs", "served", 1, note="at most 20; in a stream, too"),
    Row("return_token_ids", "served", True),
    Row("cache_salt", "served", "a"),
    Row("priority", "served", 1),
    Row("stream_options.continuous_usage_stats", "served", True, beside=_STREAM),
    Row("response_format", "served", {"type": "json_object"}, "completions"),
    Row("structured_outputs", "served", {"regex": "[ab]"}),
    Row("guided_json", "served", {"type": "object"}),
    Row("guided_regex", "served", "[ab]"),
    Row("guided_choice", "served", ["a", "b"]),
    Row("guided_grammar", "served", 'root ::= "a"'),
    Row("add_special_tokens", "served", False, "completions"),
    Row("add_special_tokens", "refused", True, "chat", "the model's template writes them"),
    Row("add_generation_prompt", "served", False, "chat"),
    Row("continue_final_message", "served", True, "chat"),
    Row("chat_template_kwargs", "served", {"enable_thinking": False}, "chat"),
    Row("echo", "refused", True, "chat"),
    Row("allowed_token_ids", "refused", [5]),
    Row("chat_template", "refused", "{{ messages }}", "chat", "the model's own is used"),
    Row("documents", "refused", [{"text": "x"}], "chat"),
    Row("guided_decoding_backend", "refused", "outlines", note="there is one, xgrammar"),
    Row("guided_whitespace_pattern", "refused", " "),
    Row("include_reasoning", "refused", False, "chat"),
    Row("kv_transfer_params", "refused", {"do_remote_decode": True}, note="the cluster hands KV off by itself"),
    Row("length_penalty", "refused", 2.0, note="but for 1; belongs to beam search"),
    Row("logits_processors", "refused", ["x"]),
    Row("media_io_kwargs", "refused", {"image": {}}, "chat"),
    Row("mm_processor_kwargs", "refused", {"a": 1}, "chat"),
    Row("prompt_embeds", "refused", "AAAA", "completions"),
    Row("request_id", "refused", "a", note="the header `x-request-id` names a request"),
    Row("return_tokens_as_token_ids", "refused", True, note="see `return_token_ids`"),
    Row("use_beam_search", "refused", True),
    Row("vllm_xargs", "refused", {"a": 1}),
)
HALFMOON = (
    Row("timeout", "served", 77.0, note="seconds for the whole request"),
    Row("slo", "served", {"tpot": 0.5}, note="`ttft` and `tpot`, in seconds"),
)
_FLAT_TOOL = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}
RESPONSES = (
    Row("model", "served", "chatty", "responses", "another than the served one is `model_not_found`"),
    Row("input", "served", "Once upon", "responses", "a text, or items: messages of text parts, calls, their outputs, reasoning"),
    Row("instructions", "served", "Be kind.", "responses", "a system message before the input"),
    Row("max_output_tokens", "served", 3, "responses"),
    Row("metadata", "served", {"a": "b"}, "responses", "comes back in the reply"),
    Row("parallel_tool_calls", "served", False, "responses", beside={"tools": [_FLAT_TOOL], "tool_choice": "required"}),
    Row(
        "reasoning",
        "served",
        {"effort": "high"},
        "responses",
        "`effort`, a variable of the model's chat template; summaries change nothing",
    ),
    Row("stream", "served", True, "responses"),
    Row("temperature", "served", 0.5, "responses"),
    Row("text", "served", {"format": {"type": "json_object"}}, "responses", "`format`; `verbosity` changes nothing"),
    Row(
        "tool_choice",
        "served",
        "required",
        "responses",
        "`allowed_tools` too; but for built-in and custom tools",
        beside={"tools": [_FLAT_TOOL]},
    ),
    Row("tools", "served", [_FLAT_TOOL], "responses", "functions alone, no `custom` tools; where the model has a [tool parser](tools.md)"),
    Row("top_p", "served", 0.5, "responses"),
    Row(
        "include",
        "served",
        ["message.output_text.logprobs"],
        "responses",
        "`message.output_text.logprobs`; `reasoning.encrypted_content` changes nothing; others are refused",
    ),
    Row("top_logprobs", "served", 2, "responses", "at most 20; of the text, not of reasoning and calls"),
    Row("max_tool_calls", "ignored", 1, "responses", "is of built-in tools"),
    Row("prompt_cache_key", "ignored", "a", "responses", "prefixes are shared wherever they are alike; see `cache_salt`"),
    Row("prompt_cache_options", "ignored", {"mode": "implicit"}, "responses"),
    Row("prompt_cache_retention", "ignored", "24h", "responses"),
    Row("safety_identifier", "ignored", "a", "responses"),
    Row("service_tier", "ignored", "flex", "responses", "a reply says `default`"),
    Row("stream_options", "ignored", {"include_obfuscation": True}, "responses", "no padding is sent"),
    Row("user", "ignored", "a", "responses"),
    Row("access_programs", "refused", {"cyber": "standard"}, "responses"),
    Row("background", "refused", True, "responses"),
    Row("context_management", "refused", [{"type": "compaction"}], "responses"),
    Row("conversation", "refused", "conv_1", "responses", "nothing is stored"),
    Row("image", "refused", {"context_compression": "auto"}, "responses"),
    Row("moderation", "refused", {"model": "omni"}, "responses"),
    Row("previous_response_id", "refused", "resp_1", "responses", "nothing is stored; send the items"),
    Row("prompt", "refused", {"id": "pmpt_1"}, "responses", "nothing is stored"),
    Row("store", "refused", True, "responses", "but for `false`"),
    Row("truncation", "refused", "auto", "responses", "but for `disabled`"),
)
RESPONSES_EXTENSIONS = (
    Row("cache_salt", "served", "a", "responses"),
    Row("chat_template_kwargs", "served", {"enable_thinking": False}, "responses"),
    Row("frequency_penalty", "served", 0.5, "responses"),
    Row("ignore_eos", "served", True, "responses"),
    Row("min_p", "served", 0.1, "responses"),
    Row("presence_penalty", "served", 0.5, "responses"),
    Row("priority", "served", 1, "responses"),
    Row("repetition_penalty", "served", 1.1, "responses"),
    Row("seed", "served", 5, "responses"),
    Row("slo", "served", {"tpot": 0.5}, "responses"),
    Row("stop", "served", ["fox"], "responses"),
    Row("timeout", "served", 77.0, "responses"),
    Row("top_k", "served", 5, "responses", "0 and -1: all tokens"),
)
HEAD = """# Conformance

Made from [proxy/openai/conformance.py](../proxy/openai/conformance.py) by `python -m halfmoon.proxy.openai.conformance`; edit there.

A test sends each field. *Served*: the request or the reply is another one with it. *Ignored*: it is taken, and changes nothing.
*Refused*: a 400 that names it. A field that is in no table is refused by name, too, with the nearest known one.
[HTTP](http.md) has the types.
"""
_ROUTES: dict[Route, str] = {
    "both": "both",
    "completions": "`/v1/completions`",
    "chat": "`/v1/chat/completions`",
    "responses": "`/v1/responses`",
}


def page() -> str:
    tables = (("OpenAI's fields", OPENAI), ("vLLM's extensions", VLLM), ("Halfmoon's own", HALFMOON))
    tables += (("OpenAI's Responses", RESPONSES), ("Extensions to Responses", RESPONSES_EXTENSIONS))
    return HEAD + "".join(_table(title, rows) for title, rows in tables)


def _table(title: str, rows: tuple[Row, ...]) -> str:
    ordered = sorted(rows, key=lambda row: row.name)
    lines = [f"| `{row.name}` | {_ROUTES[row.route]} | {row.standing} | {row.note} |" for row in ordered]
    return "\n".join([f"\n## {title}\n", "| field | route | | |", "|---|---|---|---|", *lines, ""])


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
