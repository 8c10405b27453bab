"""instructor, in its modes: python try_instructor.py BASE_URL MODEL, in an environment of its own."""

import sys
from collections.abc import Iterable

import instructor
import openai
from pydantic import BaseModel

base_url, model = sys.argv[1:]
ASKED = [{"role": "user", "content": "A person"}]


class Person(BaseModel):
    name: str
    age: int


for mode in ("TOOLS", "TOOLS_STRICT", "JSON", "JSON_SCHEMA", "PARALLEL_TOOLS", "RESPONSES_TOOLS"):
    client = instructor.from_openai(openai.OpenAI(base_url=base_url, api_key="none"), mode=instructor.Mode[mode])
    if mode == "PARALLEL_TOOLS":
        found = next(iter(client.create(model=model, messages=ASKED, response_model=Iterable[Person])))
    else:
        found = client.create(model=model, messages=ASKED, response_model=Person, max_retries=0)
    assert found.model_dump() == {"name": "Ada", "age": 36}, found
    print(mode, found)
client = instructor.from_openai(openai.OpenAI(base_url=base_url, api_key="none"), mode=instructor.Mode.TOOLS)
last = list(client.create_partial(model=model, messages=ASKED, response_model=Person))[-1]
assert last.model_dump() == {"name": "Ada", "age": 36}
