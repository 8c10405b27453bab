"""A proxy of scripted workers for clients of other libraries: calls tools one after the other, and answers what a schema asks for.

python -m halfmoon.tests.clients.scripted_server PORT     in Halfmoon's own environment; ends with its input
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from halfmoon.proxy.text.tokenizer import Tokenizer
from halfmoon.tests import faces

VALUES = {"string": "Ada", "integer": 36, "number": 0.5, "boolean": True, "null": None}
ANSWER = "Hello there, I am a script."


def instance(schema: dict[str, Any], root: dict[str, Any]) -> Any:
    """One that is valid by the schema, for what these clients ask."""
    if "$ref" in schema:
        found: Any = root
        for name in schema["$ref"].split("/")[1:]:
            found = found[name]
        return instance(found, root)
    for name in ("anyOf", "oneOf", "allOf"):
        if name in schema:
            return instance(schema[name][0], root)
    if "const" in schema or "enum" in schema:
        return schema["const"] if "const" in schema else schema["enum"][0]
    if schema.get("type") == "array":
        return [instance(schema["items"], root)]
    if "properties" in schema:
        return {name: instance(value, root) for name, value in schema["properties"].items()}
    return {} if schema.get("type") == "object" else VALUES[schema.get("type", "string")]


def json_schema_in(grammar: dict[str, Any]) -> dict[str, Any]:
    """A schema, or that of a structural tag, where reasoning may come first."""
    if grammar.get("type") != "structural_tag":
        return grammar
    parts = [grammar["format"]]
    while "json_schema" not in (part := parts.pop()):
        parts += [part["content"]] if "content" in part else part.get("elements", [])
    return part["json_schema"]


def answer(prompt: str, grammar: Any) -> str:
    told = re.search(r"# Tools\n<tools>\n(.*?)\n</tools>", prompt, re.DOTALL)
    tools = [json.loads(line) for line in told[1].splitlines()] if told else []
    called = re.findall(r'<tool_call>\n\{"name": "([^"]+)", "arguments"', prompt)
    left = [tool["function"] for tool in tools if tool["function"]["name"] not in called]
    if not tools and grammar.kind:
        schema = json_schema_in(json.loads(grammar.text or '{"type": "object"}'))
        return json.dumps(instance(schema, schema) or {"name": "Ada", "age": 36})
    if not left or (called and "all of them" not in prompt):
        return ANSWER
    schema = left[0].get("parameters", {})
    call = {"name": left[0]["name"], "arguments": instance({"type": "object"} | schema, schema)}
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = faces.write_model_folder(Path(place) / "scripted", faces.TOOLS_CHATML, max_model_len=16384)
        tokenizer = Tokenizer.from_folder(folder)
        face = faces.Face(folder, tokenizer, http_port=int(sys.argv[1]))

        def script(sequence: Any) -> list[int]:
            prompt = tokenizer.decode(list(sequence.token_ids), skip_special_tokens=False)
            return [*tokenizer.encode(answer(prompt, sequence.sampling.grammar), add_special_tokens=False), 1]

        face.workers.script = script
        print(f"{face.http}/v1", flush=True)
        sys.stdin.read()
        face.stop()


if __name__ == "__main__":
    main()
