"""The flags of `halfmoon serve`. Each is a key of the configuration file under a shorter name. --set reaches every other key."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
import yaml

from ...protocol.config import AdmissionName, ClusterConfig, Policy, QuantizationName, QueueOrder, from_mapping, given_values
from ...protocol.tls import read_pem
from ...proxy.conductor.predictors.cost_model import CostModel
from ...proxy.tenants.keys_file import KeysFile

Flag = typer.Option
DEFAULTS = ClusterConfig()
COUNTS = ("prefill", "decode", "both")  # sections that say how many workers


def setting(key: str, help: str, **options: Any) -> Any:
    """The flag of a key of the configuration, with the configuration's default in its help."""
    section, _, name = key.partition(".")
    default = getattr(getattr(DEFAULTS, section), name)
    return typer.Option(help=help, show_default=str(default) if default != "" else False, **options)


class LogLevel(enum.StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def serve(
    model: Annotated[str | None, setting("model.path", "Folder in Hugging Face format. Without it: the demo model of the package.")] = None,
    prefill: Annotated[
        int | None,
        setting("prefill.num_workers", "Prefill workers; 0: decode workers compute prompts themselves, as by default on one GPU.", min=0),
    ] = None,
    decode: Annotated[int | None, setting("decode.num_workers", "Decode workers.", min=0)] = None,
    both: Annotated[
        int | None, setting("both.num_workers", "Workers that do both; --prefill and --decode are 0 then where not given.", min=0)
    ] = None,
    address: Annotated[str | None, Flag(help="Of the Ray cluster to join, or auto. Without it: a Ray of its own.")] = None,
    hosts: Annotated[int, Flag(help="Hosts that Ray has to have before workers are placed; with --address.", min=1)] = 1,
    config: Annotated[Path | None, Flag(help="YAML file with the sections model, store, proxy, prefill, decode and both.")] = None,
    host: Annotated[str | None, setting("proxy.host", "Address that the proxy listens on.")] = None,
    http_port: Annotated[int | None, setting("proxy.http_port", "Of the OpenAI face; 0: any free one.")] = None,
    grpc_port: Annotated[int | None, setting("proxy.grpc_port", "Of the gRPC face; 0: any free one.")] = None,
    policy: Annotated[str | None, setting("proxy.policy", f"How requests are placed: {', '.join(get_args(Policy))}.")] = None,
    admission: Annotated[
        str | None, setting("proxy.admission", f"Who is refused for its SLO: {', '.join(get_args(AdmissionName))}.")
    ] = None,
    slo_ttft: Annotated[
        float | None, setting("proxy.ttft_slo_s", "Seconds to the first token, for requests without an SLO; 0: none.", min=0.0)
    ] = None,
    slo_tpot: Annotated[float | None, setting("proxy.tpot_slo_s", "Seconds between two tokens, likewise.", min=0.0)] = None,
    keys_file: Annotated[Path | None, setting("proxy.keys_file", "File of `halfmoon keys`; every request needs a key of it then.")] = None,
    order: Annotated[str | None, setting("proxy.order", f"Of the workers' queues: {', '.join(get_args(QueueOrder))}.")] = None,
    cost_model: Annotated[
        Path | None, setting("proxy.cost_model", "File with what the workers' work costs, where predictions begin.")
    ] = None,
    device: Annotated[str | None, setting("model.device", "auto, cpu or cuda.")] = None,
    dtype: Annotated[str | None, setting("model.dtype", "auto, float32, float16 or bfloat16.")] = None,
    quantization: Annotated[str | None, setting("model.quantization", f"Of the weights: {', '.join(get_args(QuantizationName))}.")] = None,
    max_model_len: Annotated[
        int | None, setting("model.max_model_len", "Tokens of prompt and answer together, at most; 0: what the model was made for.", min=1)
    ] = None,
    certs: Annotated[Path | None, setting("security.certs", "Folder of `halfmoon certs`: members talk by TLS.")] = None,
    insecure: Annotated[bool, Flag("--insecure", help="Start although others can use or read the cluster without TLS.")] = False,
    settings: Annotated[list[str] | None, Flag("--set", help="Any key of the configuration: decode.max_running=64.")] = None,
    log_level: Annotated[LogLevel, Flag(help="Of the supervisor's own log, on standard error.")] = LogLevel.WARNING,
) -> None:
    """Start or join a cluster and serve a model until interrupted; then drain."""
    if both:
        prefill, decode = prefill or 0, decode or 0
    elif decode == 0:
        raise typer.BadParameter("0 decode workers answer nobody; give --decode 1 or more, or --both", param_hint="--decode")
    flags = {
        "model.path": model,
        "model.device": device,
        "model.dtype": dtype,
        "model.quantization": quantization,
        "model.max_model_len": max_model_len,
        "prefill.num_workers": prefill,
        "decode.num_workers": decode,
        "both.num_workers": both,
        "proxy.host": host,
        "proxy.http_port": http_port,
        "proxy.grpc_port": grpc_port,
        "proxy.policy": policy,
        "proxy.admission": admission,
        "proxy.ttft_slo_s": slo_ttft,
        "proxy.tpot_slo_s": slo_tpot,
        "proxy.order": order,
        "security.certs": str(certs) if certs is not None else None,
        "security.insecure": True if insecure else None,
        "proxy.keys_file": str(keys_file) if keys_file is not None else None,
        "proxy.cost_model": str(cost_model) if cost_model is not None else None,
    }
    overrides = overridden(flags, settings)
    given = given_values(config, overrides)
    loaded = _load(given)  # before the heavy imports, so that a wrong key is reported at once
    counts_given = any("num_workers" in (given.get(section) or {}) for section in COUNTS)
    path = None if config is None else config.absolute()
    from .serve import Serving
    from .serve import serve as run

    run(Serving(loaded, lambda: _load(given_values(path, overrides)), hosts, counts_given), address, log_level.value)


FILES = ("cost_model", "keys_file", "tls_certificate", "tls_key")  # of the proxy


def _load(given: dict[str, Any]) -> ClusterConfig:
    """Raises ConfigError, also for files that the proxy would not take."""
    loaded = from_mapping(ClusterConfig, given, "")
    # because the proxy starts in another folder
    paths = {name: Path(getattr(loaded.proxy, name)).expanduser().absolute() for name in FILES if getattr(loaded.proxy, name)}
    readers: dict[str, Callable[[Path], object]] = {"cost_model": CostModel.load, "keys_file": KeysFile.load}
    for name, path in paths.items():
        readers.get(name, read_pem)(path)
    return dataclasses.replace(loaded, proxy=dataclasses.replace(loaded.proxy, **{name: str(path) for name, path in paths.items()}))


def overridden(flags: Mapping[str, Any], settings: Sequence[str] | None) -> dict[str, Any]:
    """What the user has said, by key of the configuration. flags: None where one was not given. settings: of --set, which win."""
    return {key: value for key, value in flags.items() if value is not None} | dict(map(key_and_value, settings or []))


def key_and_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"{text!r} is not key=value, as in proxy.policy=random")
    return key, yaml.safe_load(value)
