"""How a chat's answer is read, and what it is held to so that it can be.

a server: AnswerForms(tool parser, reasoning parser) ─► a request: AnswerForm ─► a choice: AnswerParser: text ─► parts
                                                             └─► Grammar: reasoning, then calls or the format that was asked for
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ...protocol.config import ModelOptions
from ...protocol.errors import InvalidRequest
from ...protocol.grammar import Grammar
from .answer_parts import CallArguments, CallBegin, Content, Part, merged
from .formats import Format, any_of, format_of, grammar_of_format
from .reasoning import BEGIN, END, REASONING_PARSERS, TAIL_TOKENS, ReasoningParser, is_over
from .tokenizer import Tokenizer
from .tool_parsers import TOOL_PARSERS
from .tool_parsers.base import ToolParser
from .tools import Function, ToolUse

Parser = TypeVar("Parser", ToolParser, ReasoningParser)


class AnswerParser:
    """One choice's answer, as its text comes."""

    def __init__(self, reasoning: ReasoningParser | None, tools: ToolParser | None, *, parallel: bool) -> None:
        """parallel: several calls are given on, and not the first one alone."""
        self._reasoning = reasoning
        self._tools = tools
        self._parallel = parallel
        self.has_calls = False

    def push(self, text: str) -> list[Part]:
        return self._with_calls([Content(text)] if self._reasoning is None else self._reasoning.push(text))

    def finish(self) -> list[Part]:
        """The parts that were held back."""
        parts = self._with_calls([] if self._reasoning is None else self._reasoning.finish())
        return parts if self._tools is None else merged([*parts, *self._kept(self._tools.finish())])

    def _with_calls(self, parts: list[Part]) -> list[Part]:
        if self._tools is None:
            return parts
        found: list[Part] = []
        for part in parts:
            found += self._kept(self._tools.push(part.text)) if isinstance(part, Content) else [part]
        return merged(found)

    def _kept(self, parts: list[Part]) -> list[Part]:
        kept = parts if self._parallel else [part for part in parts if not isinstance(part, (CallBegin, CallArguments)) or part.number == 0]
        self.has_calls = self.has_calls or any(isinstance(part, CallBegin) for part in kept)
        return kept


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """Of one request. prompt_end: the last of its prompt's text, where a chat template may have begun the reasoning or ended it."""

    forms: AnswerForms
    tools: ToolUse
    prompt_end: str

    def parser(self) -> AnswerParser:
        reasoning, tool_parser = self.forms.reasoning_parser, self.forms.tool_parser
        calls = tool_parser(self.tools.names) if tool_parser is not None and self.tools.asks else None
        return AnswerParser(None if reasoning is None else reasoning(self.prompt_end), calls, parallel=self.tools.parallel)

    @property
    def shown(self) -> frozenset[int]:
        """Special tokens that have to be part of the text, for parsers go by them."""
        tool_parser, reasoning = self.forms.tool_parser, self.forms.reasoning_parser
        markers = [*(tool_parser.markers if tool_parser is not None and self.tools.asks else ()), *(reasoning.markers if reasoning else ())]
        found = map(self.forms.tokenizer.special_token_id, markers)
        return frozenset(token_id for token_id in found if token_id is not None)

    def grammar(self, asked: Grammar | None) -> Grammar | None:
        """What the answer is held to. asked: what its content has to match. Raises InvalidRequest where both can't be held."""
        answer = self._answer_format(asked)
        if answer is None:
            return asked
        reasoning = self.forms.reasoning_parser
        if reasoning is not None:
            answer = reasoning.before(answer, self.prompt_end, self.forms.tokenizer.special_token_id)
        return grammar_of_format("tools" if self._held_calls is not None else "structural_tag", answer)

    @property
    def _held_calls(self) -> Sequence[Function] | None:
        """The functions whose calls are held to their schemas. None: no call is."""
        choice = self.tools.choice
        if not self.tools.asks:
            return None
        if isinstance(choice, Function):
            return [choice]
        if choice == "required":
            return self.tools.functions
        held = self.tools.limited or any(function.strict for function in self.tools.functions)
        return self.tools.functions if held else None

    def _answer_format(self, asked: Grammar | None) -> Format | None:
        """Without the reasoning. None: what was asked for is all there is, and no reasoning can come before it."""
        parser, token_of = self.forms.tool_parser, self.forms.tokenizer.special_token_id
        many = self.tools.parallel and parser is not None and parser.several
        if parser is not None and self.tools.asks and self.tools.choice != "auto":
            named = isinstance(self.tools.choice, Function)
            return parser.calls(self._held_calls or (), token_of, many=many and not named)
        if parser is not None and self.tools.asks and asked is not None:
            return any_of([parser.calls(self.tools.functions, token_of, many=many), self._format_of(asked)])
        if parser is not None and self._held_calls is not None:
            return parser.text_with_calls(self._held_calls, token_of, many=many)
        if asked is None or self.forms.reasoning_parser is None or is_over(self.prompt_end) or asked.kind == "structural_tag":
            return None
        return self._format_of(asked)

    @staticmethod
    def _format_of(asked: Grammar) -> Format:
        found = format_of(asked)
        if found is None:
            raise InvalidRequest("this structural_tag can't be asked for together with tools; leave one out", param="tools")
        return found


@dataclass(frozen=True, slots=True)
class AnswerForms:
    """Of a server."""

    tokenizer: Tokenizer
    tool_parser: type[ToolParser] | None = None
    reasoning_parser: type[ReasoningParser] | None = None

    @classmethod
    def chosen(cls, tokenizer: Tokenizer, options: ModelOptions) -> AnswerForms:
        """auto: by what the chat template writes, where that fits one parser and no other."""
        tools = tokenizer.template_for_tools
        with_tools = "" if tools is None else tools.literals
        plain = "" if tokenizer.chat_template is None else tokenizer.chat_template.literals
        return cls(
            tokenizer,
            _chosen(TOOL_PARSERS, options.tool_parser, with_tools),
            _chosen(REASONING_PARSERS, options.reasoning_parser, plain),
        )

    def told(self) -> str:
        """In one line; "" where answers are plain text."""
        told: list[str] = []
        if self.tool_parser is not None:
            template = self.tokenizer.template_for_tools
            blind = "" if template is not None and template.takes_tools else " (the chat template does not tell the model of tools)"
            told.append(f"tool calls as {self.tool_parser.name}{blind}")
        if self.reasoning_parser is not None:
            told.append(f"reasoning as {self.reasoning_parser.name}")
        return ", ".join(told)

    def of(self, tools: ToolUse, token_ids: Sequence[int], continued: str | None = None) -> AnswerForm | None:
        """None: the answer is plain text. Raises InvalidRequest for tools without a parser.

        Args:
            token_ids: of the prompt.
            continued: the final message that the answer goes on with.
        """
        if tools.asks and self.tool_parser is None:
            raise InvalidRequest(
                "this server can't read tool calls: it has no tool parser for this model; leave tools out, send tool_choice none, or set "
                f"model.tool_parser to one of {', '.join(TOOL_PARSERS)}",
                param="tools",
            )
        if not tools.asks and self.reasoning_parser is None:
            return None
        if continued is None:
            return AnswerForm(self, tools, self.tokenizer.decode(token_ids[-TAIL_TOKENS:], skip_special_tokens=False))
        return AnswerForm(self, tools, BEGIN if BEGIN in continued.rpartition(END)[2] else END)


def _chosen(parsers: Mapping[str, type[Parser]], name: str, written: str) -> type[Parser] | None:
    """written: the literals of the chat template."""
    if name != "auto":
        return parsers.get(name)
    found = [parser for parser in parsers.values() if parser.is_of(written)]
    return found[0] if len(found) == 1 else None
