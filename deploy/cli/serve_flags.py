"""`halfmoon serve`'s flags: each is a key of the configuration file, by a shorter name. --set reaches every other key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Flag = typer.Option


def serve(
    model: Annotated[str | None, Flag(help="Folder in Hugging Face format. Without it: the demo model of the package.")] = None,
    prefill: Annotated[int | None, Flag(help="Prefill workers.", min=1)] = None,
    decode: Annotated[int | None, Flag(help="Decode workers.", min=1)] = None,
    address: Annotated[str | None, Flag(help="Of the Ray cluster to join, or auto. Without it: a Ray of its own.")] = None,
    config: Annotated[Path | None, Flag(help="YAML file with the sections model, store, proxy, prefill and decode.")] = None,
    host: Annotated[str | None, Flag(help="Address that the proxy listens on.")] = None,
    http_port: Annotated[int | None, Flag(help="Of the OpenAI face; 0: any free one.")] = None,
    grpc_port: Annotated[int | None, Flag(help="Of the gRPC face; 0: any free one.")] = None,
    policy: Annotated[str | None, Flag(help="How requests are placed: random, round_robin, least_loaded, cache_aware.")] = None,
    device: Annotated[str | None, Flag(help="auto, cpu or cuda.")] = None,
    dtype: Annotated[str | None, Flag(help="auto, float32, float16 or bfloat16.")] = None,
    max_model_len: Annotated[int | None, Flag(help="Tokens of prompt and answer together, at most.", min=1)] = None,
    settings: Annotated[list[str] | None, Flag("--set", help="Any key of the configuration: decode.max_running=64.")] = None,
    log_level: Annotated[str, Flag(help="debug, info, warning or error.")] = "warning",
) -> None:
    """Start or join a cluster and serve a model until interrupted; then drain."""
    from .serve import serve as run  # brings ray, which --help does without

    flags = {
        "model.path": model,
        "model.device": device,
        "model.dtype": dtype,
        "model.max_model_len": max_model_len,
        "prefill.num_workers": prefill,
        "decode.num_workers": decode,
        "proxy.host": host,
        "proxy.http_port": http_port,
        "proxy.grpc_port": grpc_port,
        "proxy.policy": policy,
    }
    run(config, flags, settings or [], address, log_level)
