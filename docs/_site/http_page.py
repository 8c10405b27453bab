"""python docs/_site/http_page.py: docs/http.md, made from the proxy's own openapi.json. A test compares what is committed."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from pathlib import Path
from typing import Any

import halfmoon
from halfmoon.protocol.config import PORTS, ModelOptions, ProxyConfig
from halfmoon.protocol.schema import KVSchema
from halfmoon.proxy.server import ProxyServer

PAGE = Path(__file__).parents[1] / "http.md"
DEMO = Path(halfmoon.__path__[0]) / "engine" / "demo_model"
SCHEMA = KVSchema(model_fingerprint="docs", dtype="float32", num_layers=1, num_kv_heads=1, head_dim=8, block_size=16)
TITLES = {
    "CompletionBody": "/v1/completions",
    "ChatBody": "/v1/chat/completions",
    "ResponsesBody": "/v1/responses",
    "SloBody": "slo",
    "MessagesBody": "/v1/messages",
    "TokenizeBody": "/tokenize",
    "DetokenizeBody": "/detokenize",
}
HEAD = """# HTTP

Made from the proxy's own `/openapi.json` by `python docs/_site/http_page.py`; edit the code.

The API is OpenAI's, as far as it goes. A field that is known and not served is refused by name, so that nothing is left out in silence.
`GET /` is [the page](observing.md#the-page) and no API.

- Errors have OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.
- With `"stream": true` the reply is server-sent events, the last one `data: [DONE]`. An error after the first token is an event, too.
- A reply, and the last chunk of a stream, have `halfmoon.request_id` and `halfmoon.phases`: where the time went.
- `x-request-id` of a request becomes its id; `traceparent` its trace.
- 429 and 503 come with `retry-after` in seconds, 429 with `retry-after-ms`, too.
- A prompt that is too long is `context_length_exceeded`, an unknown model `model_not_found`, as clients expect.
- A body may be gzipped.
- Each choice has a `stop_reason`: the request's own stop string or token that ended it; null for EOS and the length.
- `cache_salt`: prefixes are shared with requests of the same tenant and salt alone.
- `truncate_prompt_tokens`: of a longer prompt the last so many tokens; -1: as many as the model takes.
- `bad_words` are words of one token; a word of several is refused. `top_k: -1` and 0 are all tokens.
- `chat_template_kwargs` are variables of the model's template (`{"enable_thinking": false}`). `reasoning_effort` is one, too;
  `none` also sets `enable_thinking` and `thinking` to false.
- `echo` with `logprobs`: the prompt's own tokens come first, with their log probabilities (`null` for the first token).
  `prompt_logprobs` is vLLM's form of the same, in each choice, in a chat's reply at its top. `max_tokens` may be 0 then. In a stream they
  come in parts, before the answer. Such a prompt uses no cached prefix, and a reply has at most 1,048,576 of them.
  lm-eval's `local-completions` reads them; it sends no BOS unless it is told `add_bos_token=True`.
- `return_token_ids`: `prompt_token_ids` and, in each choice or chunk, `token_ids`.
- `tools`, `tool_choice`, `parallel_tool_calls`, messages of role `tool`, and reasoning: [Tools and reasoning](tools.md).
- `/v1/responses` is a chat in the form of OpenAI's Responses, and stores nothing: each request has its whole conversation. `store: true`,
  `previous_response_id`, `conversation` and items that refer to stored ones are refused; a reply says `"store": false`.
  Its `input` may have messages of text parts, `function_call`, `function_call_output` and `reasoning` items. What an assistant gave in one
  turn becomes one message of the chat, reasoning as its `reasoning_content`: the item's `content`, or its `summary` where that is all.
  `encrypted_content` is not read. Tools are functions; `strict` is false where it is null. `text.format` holds the answer, strict or not.
  Its stream has typed events and no `[DONE]`; the last one is `response.completed`, `response.incomplete` (cut off) or `response.failed`.
  `reasoning_tokens` count the tokens up to the end of the reasoning, markers too.
- `/v1/messages` is Anthropic's: [Messages](messages.md). Its errors have Anthropic's shape.
- A content part of type `text` may have more fields, such as `cache_control`; parts of other types are refused by their type.

"""


def page(schema: dict[str, Any]) -> str:
    routes = [_route(path, method, found) for path, methods in schema["paths"].items() for method, found in methods.items()]
    components = schema["components"]["schemas"]
    bodies = [_body(name, components[name], components) for name in TITLES]
    statuses: dict[str, str] = {}
    for methods in schema["paths"].values():
        for status, reply in _errors(methods):
            statuses.setdefault(status, reply["description"])
    table = "\n".join(f"| {status} | {meaning} |" for status, meaning in sorted(statuses.items()))
    routed, told = "\n".join(routes), "\n".join(bodies)
    head = "| route | what it does | replies |\n|---|---|---|"
    return f"{HEAD}## Routes\n\n{head}\n{routed}\n\n{told}\n## Errors\n\n| status | means |\n|---|---|\n{table}\n"


def _errors(methods: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(status, reply) for found in methods.values() for status, reply in found["responses"].items() if status >= "400"]


def _route(path: str, method: str, found: dict[str, Any]) -> str:
    content = found["responses"]["200"].get("content", {})
    return f"| `{method.upper()} {path}` | {found['description']} | {', '.join(f'`{kind}`' for kind in content)} |"


def _body(name: str, schema: dict[str, Any], components: dict[str, Any]) -> str:
    required, served, others = schema.get("required", []), [], {"changes nothing": [], "not served; a value may ask for nothing": []}
    for field, found in sorted(schema["properties"].items(), key=lambda item: (item[0] not in required, item[0])):
        if found.get("description") in others:
            others[found["description"]].append(f"`{field}`")
        else:
            served.append(f"| `{field}` | {_type(found, components)} | {'yes' if field in required else ''} |")
    rows = "\n".join(served)
    told = [f"Taken, and changes nothing: {', '.join(others['changes nothing'])}.\n" if others["changes nothing"] else ""]
    refused = others["not served; a value may ask for nothing"]
    told += [f"Refused, unless the value asks for nothing: {', '.join(refused)}.\n" if refused else ""]
    return f"## Fields of `{TITLES[name]}`\n\n| field | type | required |\n|---|---|---|\n{rows}\n\n" + "".join(
        f"{words}\n" for words in told if words
    )


def _type(found: dict[str, Any], components: dict[str, Any]) -> str:
    if kinds := found.get("anyOf") or found.get("oneOf"):
        return " or ".join(_type(kind, components) for kind in kinds if kind.get("type") != "null")
    if "$ref" in found:
        kind = components[found["$ref"].rpartition("/")[2]]
        return f"object with {', '.join(f'`{name}`' for name in kind['properties'])}"
    if "enum" in found:
        return " or ".join(f"`{value}`" for value in found["enum"])
    if found.get("type") == "array":
        return f"list of {_type(found['items'], components)}"
    return found.get("type", "any")


async def schema() -> dict[str, Any]:
    """Of a proxy of its own, on a free port."""
    config = ProxyConfig(**dict.fromkeys(PORTS, 0))
    server = ProxyServer(config=config, options=ModelOptions(), model_folder=DEMO, schema=SCHEMA)
    endpoints = await server.start()
    try:
        return await asyncio.to_thread(lambda: json.load(urllib.request.urlopen(f"http://{endpoints.http}/openapi.json")))  # nosec B310
    finally:
        await server.stop(0.0)


if __name__ == "__main__":
    PAGE.write_text(page(asyncio.run(schema())))
