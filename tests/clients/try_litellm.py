"""litellm: python try_litellm.py BASE_URL MODEL, in an environment of its own."""

import asyncio
import json
import sys

import litellm
from pydantic import BaseModel

base_url, model = sys.argv[1:]
HELLO = [{"role": "user", "content": "Hello"}]
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": PARAMETERS}}]


class Person(BaseModel):
    name: str
    age: int


for provider in ("openai", "hosted_vllm"):
    common = {"model": f"{provider}/{model}", "api_base": base_url, "api_key": "none"}
    assert litellm.completion(messages=HELLO, **common).choices[0].message.content
    chunks = list(litellm.completion(messages=HELLO, stream=True, stream_options={"include_usage": True}, **common))
    assert chunks[-1].usage.completion_tokens > 0
    assert asyncio.run(litellm.acompletion(messages=HELLO, **common)).usage.total_tokens
    for response_format in (Person, {"type": "json_object"}):
        reply = litellm.completion(messages=HELLO, response_format=response_format, **common)
        assert json.loads(reply.choices[0].message.content) == {"name": "Ada", "age": 36}
    for choice in ("auto", "required", {"type": "function", "function": {"name": "add"}}):
        reply = litellm.completion(messages=HELLO, tools=TOOLS, tool_choice=choice, **common)
        assert reply.choices[0].message.tool_calls[0].function.name == "add", reply
    rebuilt = litellm.stream_chunk_builder(list(litellm.completion(messages=HELLO, tools=TOOLS, stream=True, **common)))
    assert rebuilt.choices[0].message.tool_calls[0].function.name == "add", rebuilt
    reply = litellm.responses(input="Hello", tools=[{"type": "function", **TOOLS[0]["function"]}], **common)
    assert any(item.type == "function_call" for item in reply.output), reply
    try:
        litellm.completion(messages=[{"role": "user", "content": "word " * 40000}], **common)
        raise AssertionError("too long a prompt was taken")
    except litellm.ContextWindowExceededError:
        pass
    print(provider, "completion, stream, usage, async, response_format, tools, responses, context window error")
