"""`halfmoon chat`: a conversation in the terminal.

you ─► text              a turn; the answer streams, and ctrl-c takes the turn back
    ─► /document FILE    is put before your next message      ─► /quit, or the end of the input
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ...client import Client, Conversation, HalfmoonError
from ...client.options import GenerateOptions
from .terminal import DEFAULT_ADDRESS, Address, ApiKey, Authority, authority_of, print_stream, seconds

HELP = "/document FILE gives the model a document, /quit ends, ctrl-c cancels a turn"


class ChatSession:
    def __init__(self, client: Client, options: GenerateOptions, system: str | None) -> None:
        self._client = client
        self._options = options
        self._conversation = Conversation(system)
        self._documents: list[str] = []
        self._out = Console()
        self._about = Console(stderr=True)

    def run(self) -> None:
        """Runs until /quit or the end of the input."""
        while True:
            try:
                line = self._about.input("[bold]> [/]").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._note(f"\n{HELP}")
                continue
            if line == "/quit":
                return
            if line.startswith("/document"):
                self._add_document(line.removeprefix("/document").strip())
            elif line.startswith("/"):
                self._note(f"there is no command {line.split()[0]}; {HELP}")
            elif line:
                self._turn(line)

    def _add_document(self, name: str) -> None:
        try:
            text = Path(name).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            self._note(f"cannot read {name or 'a file without a name'}: {error}")
            return
        self._documents.append(f"Document {Path(name).name}:\n{text}")
        self._note(f"{Path(name).name}, {len(text)} characters, goes ahead of your next message")

    def _turn(self, line: str) -> None:
        messages = self._conversation.user("\n\n".join([*self._documents, line]))
        try:
            with self._client.stream(messages=messages, **self._options) as stream:  # pyright: ignore[reportCallIssue]
                print_stream(stream, self._out)
                completion = stream.completion()
        except KeyboardInterrupt:
            self._conversation.undo()
            self._note("\ncancelled; the turn is taken back")
        except HalfmoonError as error:
            self._conversation.undo()
            self._note(f"halfmoon: {error.message}")
        else:
            self._conversation.assistant(completion)
            self._documents.clear()
            usage, phases = completion.usage, completion.phases
            self._note(
                f"{usage.num_prompt_tokens} tokens read ({usage.num_cached_tokens} cached), {usage.num_completion_tokens} written; "
                f"first after {seconds(phases.ttft_s)}, then {seconds(phases.tpot_s)} each"
            )

    def _note(self, text: str) -> None:
        self._about.print(text, style="dim", markup=False, highlight=False)


def chat(
    address: Address = DEFAULT_ADDRESS,
    api_key: ApiKey = "",
    ca: Authority = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the first turn.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Length of an answer, at most.")] = None,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
) -> None:
    """Talk with the model, turn by turn."""
    options: GenerateOptions = {"temperature": temperature}
    if max_tokens is not None:
        options["max_tokens"] = max_tokens
    if seed is not None:
        options["seed"] = seed
    with Client(address, api_key=api_key, authority=authority_of(ca)) as client:
        model = client.models()[0]
        Console(stderr=True).print(f"{model.id}, {model.max_model_len} tokens; {HELP}", style="dim", markup=False, highlight=False)
        ChatSession(client, options, system).run()
