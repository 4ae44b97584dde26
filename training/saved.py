"""Files of a training: the state that it goes on from, and what was logged as tables."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from core.errors import AttackPlaneError
from core.files import write_atomically
from core.rows import Row
from plots.training_png import LOSSES
from training.data import REPLIES

STATE, SECONDS = "state.pt", "seconds.csv"
KEPT = {"adapter": dict, "optimiser": dict, "method": dict, "losses": list, "seconds": list}
"""What the saved state holds."""


def refuse_foreign(out: Path, *names: str) -> None:
    """Refuse a folder that holds files of a training's names, or of ``names``, and no run.

    Raises:
        AttackPlaneError: it does; nothing was written.
    """
    if (out / "manifest.json").is_file() or not out.is_dir():
        return
    known = (STATE, LOSSES, SECONDS, REPLIES, *names)
    there = [path.name for path in out.iterdir()]
    ours = [n for n in there if n in known or n.startswith("step-")]
    if ours:
        raise AttackPlaneError(
            "the folder holds files that no training of ours wrote",
            where=out,
            got=", ".join(sorted(ours)[:3]),
            remedy="choose another --out; nothing was written",
        )


def saved_state(path: Path) -> Row | None:
    """The state of a training that was stopped, or None.

    Raises:
        AttackPlaneError: it is broken, or of an earlier version.
    """
    if not path.is_file():
        return None
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # broken bytes stop the unpickler in any way
        raise AttackPlaneError(
            "the saved state of the training cannot be read",
            where=path,
            got=f"{type(error).__name__}: {str(error)[:80]}",
            remedy="remove the file to train anew, or choose another --out",
        ) from error
    forms = {k: type(v) for k, v in state.items()} if isinstance(state, dict) else {}
    rows = [*state["losses"], *state["seconds"]] if forms == KEPT else [None]
    if not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows):
        raise AttackPlaneError(
            "not the state of a training, or one of an earlier version",
            where=path,
            got=sorted(state) if isinstance(state, dict) else type(state).__name__,
            remedy="remove the file to train anew, or choose another --out",
        )
    return state


def save_state(out: Path, state: Row) -> None:
    """Write the state and its tables; each file appears only when whole."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(out / STATE, buffer.getvalue())
    write_tables(out, state["losses"], state["seconds"])


def write_tables(out: Path, losses: Sequence[Row], seconds: Sequence[Row]) -> None:
    """What was logged, as CSV; each file appears only when whole."""
    write_atomically(out / LOSSES, table(losses))
    write_atomically(out / SECONDS, table(seconds))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as CSV, with six significant digits."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [",".join(columns)]
    lines += [",".join(_cell(row.get(key)) for key in columns) for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.6g}"
