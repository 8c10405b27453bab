"""`halfmoon generate PROMPT`: one prompt through the cluster, streamed, and where its time went."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from ...client import Client
from ...client.options import GenerateOptions
from .terminal import DEFAULT_ADDRESS, Address, ApiKey, Authority, authority_of, phase_table, print_stream


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    address: Address = DEFAULT_ADDRESS,
    api_key: ApiKey = "",
    ca: Authority = None,
    max_tokens: Annotated[int, typer.Option(help="Length of the answer, at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 1.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    top_k: Annotated[int, typer.Option(help="0: all tokens.")] = 0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer at this text. May be given several times.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds for the whole request.")] = None,
) -> None:
    """Continue a prompt; ends with the request's phase record."""
    options: GenerateOptions = {"prompt": prompt, "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    if seed is not None:
        options["seed"] = seed
    if stop:
        options["stop"] = stop
    if timeout is not None:
        options["timeout_s"] = timeout
    with Client(address, api_key=api_key, authority=authority_of(ca)) as client, client.stream(**options) as stream:
        print_stream(stream, Console())
        completion = stream.completion()
    Console(stderr=True).print(phase_table(completion.phases, completion.usage))
