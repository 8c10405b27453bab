"""A model's chat template, rendered as transformers' apply_chat_template renders it, without transformers.

messages + special tokens ─► jinja2, sandboxed (templates come with checkpoints: untrusted code) ─► prompt text

The environment (trimming, loop controls, tojson without HTML escapes, raise_exception, strftime_now, the
`{% generation %}` tag) follows transformers/utils/chat_template_utils.py, version 5.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, cast

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from ...protocol.errors import CheckpointError, InvalidRequest, shown
from .folder import NAMES


class ChatMessage(NamedTuple):
    """extra: what a template may find in a message beside these: tool_calls, tool_call_id, name, reasoning_content."""

    role: str
    content: str
    extra: Mapping[str, Any] = {}

    @property
    def num_chars(self) -> int:
        return len(self.content) + (num_chars(self.extra) if self.extra else 0)


def num_chars(value: Any) -> int:
    """Of all text in a value of JSON."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(len(key) + num_chars(found) for key, found in cast(Mapping[str, Any], value).items())
    if isinstance(value, (list, tuple)):
        return sum(map(num_chars, cast(Sequence[Any], value)))
    return 0


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


class ChatOptions(NamedTuple):
    """What a request says of how its chat is rendered.

    add_generation_prompt: the prompt ends where the assistant begins.
    continue_final_message: the prompt ends inside the last message, which the answer continues.
    variables: of the template's own, such as enable_thinking.
    tools: that the model is told of, as clients define them.
    """

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: Mapping[str, Any] = {}
    tools: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def asked(
        cls,
        variables: Mapping[str, Any],
        *,
        reasoning_effort: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> ChatOptions:
        """As a request says it; None: nothing is said. Raises InvalidRequest."""
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude one another; set one of them", param="continue_final_message"
            )
        taken = sorted(OURS & variables.keys())
        if taken:
            raise InvalidRequest(
                f"chat_template_kwargs has {taken[0]}, which is a field of the request or comes from one", param="chat_template_kwargs"
            )
        if reasoning_effort is not None:
            if reasoning_effort not in EFFORTS:
                raise InvalidRequest(
                    f"reasoning_effort is {shown(reasoning_effort)}; it may be {', '.join(EFFORTS)}", param="reasoning_effort"
                )
            variables = {"reasoning_effort": reasoning_effort, **variables}
        if reasoning_effort == "none":
            variables = {"enable_thinking": False, "thinking": False, **variables}
        begins = not continue_final_message if add_generation_prompt is None else add_generation_prompt
        return cls(begins, continue_final_message, variables, tools)


PLAIN = ChatOptions()
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
_END_MARK = "\U000f0002 "  # for private use: stands where a final message ends that is to be continued; a template may trim its blank
OURS = frozenset(("messages", "tools", "documents", "add_generation_prompt"))
"""Variables of every template, which a request has fields for."""


class ChatTemplate:
    """Raises CheckpointError if the source does not parse, or names a special token of which the folder says nothing.

    Args:
        special_tokens: "bos_token" -> "<s>" …, visible to the template.
        absent: names of special tokens that the folder says it has not.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, Any], absent: Collection[str] = ()) -> None:
        self._special_tokens = dict(special_tokens)
        environment = _environment()
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"the chat template does not parse: line {error.lineno}: {error.message}") from error
        _require_named(tree, {*special_tokens, *absent})
        self.literals = "".join(_literals(tree))
        """All text that the template itself can write."""
        self.takes_tools = "tools" in jinja2.meta.find_undeclared_variables(tree)

    def render(self, messages: Sequence[ChatMessage], options: ChatOptions = PLAIN) -> str:
        """Raises InvalidRequest if the template refuses the messages, for instance the order of their roles."""
        turns = [{"role": message.role, "content": message.content, **message.extra} for message in messages]
        if options.continue_final_message and turns:
            turns[-1]["content"] += _END_MARK
        try:
            text = self._template.render(
                {
                    **self._special_tokens,
                    **options.variables,
                    "messages": turns,
                    "tools": list(options.tools) or None,
                    "documents": None,
                    "add_generation_prompt": options.add_generation_prompt,
                }
            )
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error.message}", param="messages") from error
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            # the template's code failed on these messages; it belongs to the checkpoint
            raise InvalidRequest(f"the model's chat template fails on these messages: {error}", param="messages") from error
        return _continued(text, messages) if options.continue_final_message else text


def _continued(text: str, messages: Sequence[ChatMessage]) -> str:
    """The text up to the end of the last message. Where the template trims messages, this one's last blanks are gone, too."""
    mark = _END_MARK.strip()
    before, found, after = text.rpartition(mark)
    if not found or messages[-1].content.strip() not in before:
        raise InvalidRequest(
            "the model's chat template does not write the last message as it is, so that it cannot be continued",
            param="continue_final_message",
        )
    return before if after.startswith(_END_MARK.removeprefix(mark)) else before.rstrip()


def _literals(tree: jinja2.nodes.Template) -> Iterator[str]:
    for node in tree.find_all((jinja2.nodes.TemplateData, jinja2.nodes.Const)):
        text = node.data if isinstance(node, jinja2.nodes.TemplateData) else cast(jinja2.nodes.Const, node).value
        if isinstance(text, str):
            yield text


def _require_named(tree: jinja2.nodes.Template, known: Collection[str]) -> None:
    """Jinja renders an unknown name as nothing, and the model would miss its BOS without a word. A name that is tested may be unknown."""
    tested = {name.name for test in tree.find_all((jinja2.nodes.Test, jinja2.nodes.If, jinja2.nodes.CondExpr)) for name in _of(test)}
    unknown = sorted(
        name for name in jinja2.meta.find_undeclared_variables(tree) if name in NAMES and name not in known and name not in tested
    )
    if unknown:
        raise CheckpointError(
            f"the chat template names {unknown[0]}, of which neither tokenizer_config.json nor special_tokens_map.json says anything; "
            f"give {unknown[0]} there, or null where the model has none"
        )


def _of(test: jinja2.nodes.Node) -> Iterator[jinja2.nodes.Name]:
    """The names that a test asks about."""
    condition = test if isinstance(test, jinja2.nodes.Test) else cast(jinja2.nodes.If, test).test
    return condition.find_all(jinja2.nodes.Name)
