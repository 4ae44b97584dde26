"""What a checkpoint says of itself: its arm, step and seed, and what it was trained on."""

from __future__ import annotations

import json
from pathlib import Path

from core.errors import AttackPlaneError
from core.files import write_atomically
from core.rows import Row
from core.specs import parse_spec

CARD = "attack_plane.json"


def card_of(spec: str) -> Row:
    """The card of a checkpoint; {} where the spec names none of ours.

    Raises:
        AttackPlaneError: the card is broken.
    """
    adapter = parse_spec(spec).adapter
    path = Path(adapter or "") / CARD
    if not adapter or not path.is_file():
        return {}
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(card["trained_on"], list) and isinstance(card["arm"], str)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise AttackPlaneError(
            "not the card of a checkpoint",
            where=path,
            got=f"{type(error).__name__}: {error}",
            remedy="train the checkpoint anew, or remove the file",
        ) from error
    return card


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
