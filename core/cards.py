"""What a checkpoint says of itself: its arm, step and seed, and what it was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from core.files import read_object, write_atomically
from core.rows import Row
from core.specs import parse_spec
from core.typed import checked_row

CARD = "attack_plane.json"


class _Card(TypedDict):
    arm: str
    trained_on: list[str]
    step: NotRequired[int]
    seed: NotRequired[int | None]
    base: NotRequired[str]
    settings: NotRequired[str]
    method: NotRequired[str]
    variant: NotRequired[dict[str, Any]]
    common: NotRequired[str]


def card_of(spec: str) -> Row:
    """The card of a checkpoint; {} where the spec names none of ours.

    Raises:
        AttackPlaneError: the card is broken.
    """
    adapter = parse_spec(spec).adapter
    path = Path(adapter or "") / CARD
    if not adapter or not path.is_file():
        return {}
    remedy = "train the checkpoint anew, or remove the file"
    card = read_object(path, "the card of a checkpoint", remedy=remedy)
    return checked_row(card, _Card, path, remedy)


def write_card(folder: Path, card: Row) -> None:
    """Write the card of a checkpoint."""
    write_atomically(folder / CARD, json.dumps(card, indent=2) + "\n")


def base_of(spec: str) -> str:
    """The spec without its adapter; precision stays."""
    parsed = parse_spec(spec)
    if not parsed.adapter:
        return spec
    rest, mark, query = spec.partition("?")
    return rest.removesuffix(f"+{parsed.adapter}") + mark + query
