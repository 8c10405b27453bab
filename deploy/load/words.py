"""Prompts as text for endpoints that take no token ids: a word for each id, which is about one token in most vocabularies."""

from __future__ import annotations

from .plan import TokenIds

WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand part place "
    "case week company system program question work government number night point home water room mother area money story fact "
    "month lot right study book eye job word business issue side kind head house service friend father power hour game line end "
    "member law car city community name president team minute idea kid body information back parent face others level office door "
    "health person art war history party result change morning reason research girl guy moment air teacher force education foot boy "
    "age policy music market sense nation plan college interest death experience effect use class control field development role "
    "effort rate heart drug show leader light voice wife whole "
).split()  # fmt: skip


def to_text(token_ids: TokenIds) -> str:
    """Equal ids at the start give equal text at the start."""
    return " ".join(WORDS[token_id % len(WORDS)] for token_id in map(int, token_ids))
