"""What an endpoint reports of itself before the load begins."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp

from ...protocol.errors import ConfigError, Unavailable
from .plan import PlannedRequest
from .sender import authorization, base_url


@dataclass(frozen=True, slots=True)
class ServerCard:
    url: str
    model: str
    max_model_len: int | None
    owned_by: str
    version: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


async def read_card(session: aiohttp.ClientSession, url: str, model: str = "", api_key: str = "") -> ServerCard:
    """model: the one to use; empty: the endpoint's first.

    Raises Unavailable if nothing answers as an OpenAI endpoint, ConfigError for a model that it does not have.
    """
    models = await _get(session, f"{base_url(url)}/models", api_key)
    try:
        cards: list[dict[str, Any]] = models["data"]
        names = [card["id"] for card in cards]
    except (KeyError, TypeError) as error:
        raise Unavailable(f"{base_url(url)}/models answers, but not with a list of models: {json.dumps(models)[:200]}") from error
    if not names:
        raise Unavailable(f"{url} has no model")
    if model and model not in names:
        raise ConfigError(f"{url} has no model {model!r}; it has {', '.join(names)}")
    card = cards[names.index(model) if model else 0]
    try:
        version = (await _get(session, f"{base_url(url).removesuffix('/v1')}/version", api_key)).get("version", "")
    except Unavailable:
        version = ""  # few servers have it
    return ServerCard(url, card["id"], card.get("max_model_len"), str(card.get("owned_by", "")), str(version))


def require_room(card: ServerCard, requests: tuple[PlannedRequest, ...]) -> None:
    """Raises ConfigError if a request is longer than the model takes, because it would be refused."""
    limit = card.max_model_len
    too_long = [one for one in requests if limit and one.num_input_tokens + one.num_output_tokens > limit]
    if too_long:
        raise ConfigError(
            f"{len(too_long)} of {len(requests)} requests are longer than the {limit} tokens of prompt and answer that {card.model} at "
            f"{card.url} takes; lower --max-input and --max-output"
        )


async def _get(session: aiohttp.ClientSession, url: str, api_key: str) -> Any:
    try:
        async with session.get(url, headers=authorization(api_key), timeout=aiohttp.ClientTimeout(total=30.0)) as response:
            text = await response.text()
            if response.status != 200:
                raise Unavailable(f"{url} answers {response.status}: {text[:200]}")
            return json.loads(text)
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        raise Unavailable(f"no OpenAI endpoint at {url}: {error or type(error).__name__}") from error
