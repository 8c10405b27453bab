"""langchain-openai, langchain's agent: python try_langchain.py BASE_URL MODEL, in an environment of its own."""

import sys

from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

base_url, model = sys.argv[1:]


class Person(BaseModel):
    name: str
    age: int


@tool
def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


@tool
def weather(city: str) -> str:
    """The weather there."""
    return f"sunny in {city}"


for responses in (False, True):
    chat = ChatOpenAI(base_url=base_url, api_key="none", model=model, use_responses_api=responses, max_retries=0)
    told = "responses" if responses else "chat"
    assert chat.invoke("Hello").text
    assert "".join(chunk.text for chunk in chat.stream("Hello"))
    for method in ("function_calling", "json_mode", "json_schema"):
        if responses and method == "json_mode":
            continue
        found = chat.with_structured_output(Person, method=method).invoke("A person as JSON")
        assert isinstance(found, Person), found
        print(told, "with_structured_output", method, found)
    streamed = list(chat.with_structured_output(Person, method="json_schema").stream("A person as JSON"))
    assert streamed[-1] == Person(name="Ada", age=36), streamed
    bound = chat.bind_tools([add, weather])
    (call,) = bound.invoke("Add").tool_calls
    assert call["name"] == "add" and set(call["args"]) == {"a", "b"}, call
    strict = chat.bind_tools([weather], tool_choice="weather", strict=True).invoke("Weather")
    assert strict.tool_calls[0]["name"] == "weather"
    gathered = None
    for chunk in bound.stream("Add"):
        gathered = chunk if gathered is None else gathered + chunk
    assert gathered.tool_calls[0]["name"] == "add", gathered
    print(told, "bind_tools", call["args"])
    agent = create_agent(chat, [add, weather])
    messages = agent.invoke({"messages": [{"role": "user", "content": "Use all of them"}]})["messages"]
    assert [message.type for message in messages] == ["human", "ai", "tool", "ai", "tool", "ai"], messages
    print(told, "agent:", [message.name or message.text for message in messages])
    batch = chat.batch(["Hello", "Hello"])
    assert len(batch) == 2
logprobs = (
    ChatOpenAI(base_url=base_url, api_key="none", model=model, logprobs=True, top_logprobs=2).invoke("Hello").response_metadata["logprobs"]
)
assert logprobs["content"][0]["top_logprobs"]
