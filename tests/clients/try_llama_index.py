"""llama-index with OpenAILike: python try_llama_index.py BASE_URL MODEL, in an environment of its own."""

import asyncio
import sys

from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

base_url, model = sys.argv[1:]


class Person(BaseModel):
    """A person."""

    name: str
    age: int


def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


def weather(city: str) -> str:
    """The weather there."""
    return f"sunny in {city}"


common = {"model": model, "api_base": base_url, "api_key": "none", "is_chat_model": True, "max_retries": 0, "context_window": 16384}
for told, options in (("tools", {"is_function_calling_model": True}), ("json_schema", {"should_use_structured_outputs": True})):
    llm = OpenAILike(**common, **options)
    found = llm.structured_predict(Person, PromptTemplate("A person as JSON"))
    assert found == Person(name="Ada", age=36), found
    assert llm.as_structured_llm(Person).complete("A person as JSON").raw == found
    print(told, "structured_predict", found)
llm = OpenAILike(**common, is_function_calling_model=True)
tools = [FunctionTool.from_defaults(add), FunctionTool.from_defaults(weather)]
reply = llm.chat_with_tools(tools, "Add")
assert llm.get_tool_calls_from_response(reply)[0].tool_name == "add", reply
assert "".join(chunk.delta or "" for chunk in llm.stream_complete("Hello"))


async def work() -> None:
    agent = FunctionAgent(tools=tools, llm=llm)
    answer = await agent.run("Use all of them")
    assert [call.tool_name for call in answer.tool_calls] == ["add", "weather"], answer
    print("agent:", [call.tool_name for call in answer.tool_calls], answer)


asyncio.run(work())
