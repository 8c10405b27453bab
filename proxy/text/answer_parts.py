"""What an answer's text consists of, once it is read: content, reasoning, tool calls."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Content(NamedTuple):
    text: str


class Reasoning(NamedTuple):
    text: str


class CallBegin(NamedTuple):
    """number: of the call in its answer, from 0. id: by which its result will name it."""

    number: int
    id: str
    name: str


class CallArguments(NamedTuple):
    """A piece of a call's arguments. All pieces of a call together are the JSON of an object, unless the answer breaks off."""

    number: int
    text: str


Part = Content | Reasoning | CallBegin | CallArguments


def merged(parts: Iterable[Part]) -> list[Part]:
    """The same with neighbours of one kind as one; none is empty."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        if isinstance(part, CallBegin):
            found.append(part)
        elif not part.text:
            continue
        elif last is not None and not isinstance(last, CallBegin) and type(last) is type(part) and last[:-1] == part[:-1]:
            found[-1] = last._replace(text=last.text + part.text)
        else:
            found.append(part)
    return found
