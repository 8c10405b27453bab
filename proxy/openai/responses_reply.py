"""A generation as OpenAI's Responses have it: one object, or typed events of which the last has the object.

created, in_progress ─► output_item.added ─► … delta … ─► output_item.done ─► … ─► completed | incomplete | failed
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from ...client.completion import PhaseRecord
from ...protocol.errors import HalfmoonError
from ...protocol.v1 import common_pb2
from ..requests.generation import ChoiceEnd, Generation, GenerationEvent
from .encoded import items, listed, to_json
from .errors import error_body
from .event_writer import EventWriter
from .responses_body import ResponsesBody
from .responses_output import Event, OutputItems

_TEXT_FORMAT = {"type": "text"}


async def echo_of(body: ResponsesBody) -> bytes:
    """The fields of a request that each of its objects repeats, as the inside of a JSON object. What may be long is encoded once."""
    tools: list[bytes] = []
    for tool in body.tools or ():
        tools.append(items([{"parameters": None, "strict": None, **tool.model_dump(exclude_unset=True)}]))
        await asyncio.sleep(0)
    text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text is not None else {}
    effort = None if body.reasoning is None else body.reasoning.effort
    choice = body.tool_choice
    echoed = {
        "instructions": body.instructions,
        "metadata": body.metadata or {},
        "text": {"format": _TEXT_FORMAT, **text},
        "tool_choice": choice if choice is None or isinstance(choice, str) else choice.model_dump(),
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "reasoning": {"effort": effort, "summary": None},
        "max_output_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_logprobs": body.top_logprobs or 0,
    }
    if choice is None:
        echoed["tool_choice"] = "auto"
    return to_json(echoed)[1:-1].encode() + b',"tools":' + b"".join(listed(tools))


class ResponseObject:
    def __init__(self, generation: Generation, echo: bytes) -> None:
        self._generation = generation
        self._echo = echo

    def begun(self) -> bytes:
        return self._json("in_progress", [])

    def ended(self, output: OutputItems, end: ChoiceEnd) -> tuple[str, bytes]:
        """Its status, and its JSON."""
        status = "completed" if is_complete(end) else "incomplete"
        reason = None if is_complete(end) else {"reason": "max_output_tokens"}
        phases = [{"index": 0, **PhaseRecord.from_proto(end.phases).as_dict()}]
        fields = {
            "incomplete_details": reason,
            "completed_at": int(time.time()) if is_complete(end) else None,
            "usage": self._usage(output, end),
            "halfmoon": {"request_id": self._generation.request_id, "phases": phases},
        }
        return status, self._json(status, output.items, **fields)

    def failed(self, output: OutputItems, error: dict[str, Any]) -> bytes:
        """error: the inside of an HTTP reply's."""
        return self._json("failed", output.items, error=error)

    def _json(self, status: str, output: list[dict[str, Any]], **fields: Any) -> bytes:
        generation = self._generation
        own = {
            "id": f"resp_{generation.request_id}",
            "object": "response",
            "created_at": generation.created,
            "completed_at": None,
            "status": status,
            "model": generation.model,
            "output": output,
            "error": None,
            "incomplete_details": None,
            "background": False,
            "previous_response_id": None,
            "service_tier": "default",
            "store": False,
            "truncation": "disabled",
            "usage": None,
            **fields,
        }
        return b"".join((to_json(own)[:-1].encode(), b",", self._echo, b"}"))

    def _usage(self, output: OutputItems, end: ChoiceEnd) -> dict[str, Any]:
        num_input, num_output = self._generation.num_prompt_tokens, end.usage.num_completion_tokens
        return {
            "input_tokens": num_input,
            # OpenAI's clients require cache_write_tokens; nothing is charged for writes here
            "input_tokens_details": {"cached_tokens": end.usage.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": num_output,
            "output_tokens_details": {"reasoning_tokens": output.num_reasoning_tokens},
            "total_tokens": num_input + num_output,
        }


class ResponseWriter(EventWriter):
    def __init__(self, generation: Generation, echo: bytes, path: str) -> None:
        super().__init__(generation, path)
        self._object = ResponseObject(generation, echo)
        self._output = OutputItems(generation.request_id, generation.form)
        self._num_events = 0

    async def whole(self) -> list[bytes]:
        found = b""
        while events := await self._generation.next_events():
            for event in events:
                if isinstance(event, ChoiceEnd):
                    self._output.end(complete=is_complete(event))
                    _, found = self._object.ended(self._output, event)
                else:
                    self._output.take(event)
        return [found]

    async def _written(self, events: Sequence[GenerationEvent]) -> bytes:
        return (b"" if self._begun else self._opening()) + b"".join(map(self._of, events))

    def _failed(self, error: HalfmoonError) -> bytes:
        """The last event: the response with the error."""
        return self._about("response.failed", self._object.failed(self._output, error_body(error, self._path)["error"]))

    def _opening(self) -> bytes:
        begun = self._object.begun()
        return self._about("response.created", begun) + self._about("response.in_progress", begun)

    def _of(self, event: GenerationEvent) -> bytes:
        if not isinstance(event, ChoiceEnd):
            return b"".join(map(self._event, self._output.take(event)))
        told = b"".join(map(self._event, self._output.end(complete=is_complete(event))))
        status, found = self._object.ended(self._output, event)
        return told + self._about(f"response.{status}", found)

    def _event(self, event: Event) -> bytes:
        return f"event: {event['type']}\ndata: {to_json(event | {'sequence_number': self._number()})}\n\n".encode()

    def _about(self, kind: str, response: bytes) -> bytes:
        """An event with the response in its state."""
        head = f'event: {kind}\ndata: {{"type":"{kind}","sequence_number":{self._number()},"response":'
        return b"".join((head.encode(), response, b"}\n\n"))

    def _number(self) -> int:
        self._num_events += 1
        return self._num_events - 1


def is_complete(end: ChoiceEnd) -> bool:
    return end.reason != common_pb2.FINISH_REASON_LENGTH
