"""A model's chat template, rendered as transformers' apply_chat_template renders it, without transformers.

messages + special tokens ─► jinja2, sandboxed (templates come with checkpoints: untrusted code) ─► prompt text

The environment (trimming, loop controls, tojson without HTML escapes, raise_exception, strftime_now, the
`{% generation %}` tag) follows transformers/utils/chat_template_utils.py, version 5.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from ...protocol.errors import CheckpointError, InvalidRequest


class ChatMessage(NamedTuple):
    role: str
    content: str


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training. Its body is rendered as plain text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own form

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """namespace() without names that begin with an underscore, which would reach CPython's internals."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a chat template may not store {name!r} in a namespace")
        super().__setitem__(name, value)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace)
    return environment


class ChatTemplate:
    """Raises CheckpointError if the source does not parse.

    Args:
        special_tokens: "bos_token" -> "<s>" …, visible to the template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, Any]) -> None:
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"the chat template does not parse: line {error.lineno}: {error.message}") from error

    def render(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True) -> str:
        """Raises InvalidRequest if the template refuses the messages, for instance the order of their roles."""
        try:
            return self._template.render(
                messages=[message._asdict() for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error.message}", param="messages") from error
        except (TypeError, ValueError, ArithmeticError, LookupError) as error:
            # the template's code failed on these messages; it belongs to the checkpoint
            raise InvalidRequest(f"the model's chat template fails on these messages: {error}", param="messages") from error
