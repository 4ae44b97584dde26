"""Losses of searches and trainings, sent to a tracker that the user has: ``--log-to KIND``.

Work says what it measures with ``track``. Outside ``tracking`` nobody listens. A tracker that fails
on the way is let go with a warning: hours of search do not end because of a picture.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from core.errors import AttackPlaneError
from core.rows import Row

KINDS = ("tensorboard", "trackio", "wandb")
PROJECT = "attack-plane"
Log = Callable[[str, int, Mapping[str, float]], None]
_log: ContextVar[Log | None] = ContextVar("log", default=None)
log = logging.getLogger(__name__)


def track(series: str, step: int, values: Mapping[str, float]) -> None:
    """Values of one step of a series, such as ("gcg/fraud_1", 12, {"loss": 1.5})."""
    send = _log.get()
    if send is None:
        return
    try:
        send(series, step, values)
    except Exception as error:  # noqa: BLE001  whatever another's package raises
        log.warning("nothing more is tracked: %s: %s", type(error).__name__, error)
        _log.set(None)


@contextmanager
def tracking(kind: str | None, folder: Path, settings: Row) -> Iterator[None]:
    """While open, what is tracked goes to a tracker.

    Args:
        kind: one of ``KINDS``; None: to none.
        folder: the run's; it names the run there, and holds what the tracker writes.
        settings: shown beside the curves.

    Raises:
        AttackPlaneError: the package is missing, or the tracker cannot be opened.
    """
    if kind is None or os.environ.get("RANK", "0") != "0":  # of several processes the first
        yield
        return
    name = {"tensorboard": "torch.utils.tensorboard"}.get(kind, kind)
    try:
        package = importlib.import_module(name)
        send, close = {"tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb}[kind](
            package, folder, settings
        )
    except ImportError as error:
        raise AttackPlaneError(
            f"--log-to {kind} needs the package {kind}", got=error, remedy=f"pip install {kind}"
        ) from error
    except Exception as error:
        raise AttackPlaneError(
            f"{kind} cannot be opened", where="--log-to", got=f"{type(error).__name__}: {error}"
        ) from error
    token = _log.set(send)
    try:
        yield
    finally:
        _log.reset(token)
        try:
            close()
        except Exception as error:  # noqa: BLE001  what was logged is no part of the result
            log.warning("%s did not end well: %s: %s", kind, type(error).__name__, error)


Opened = tuple[Log, Callable[[], object]]
"""Takes values, and ends."""


def _tensorboard(package: Any, folder: Path, settings: Row) -> Opened:
    writer = package.SummaryWriter(str(folder / "tensorboard"))
    writer.add_text("settings", "\n\n".join(f"{k}: {v}" for k, v in settings.items()))

    def send(series: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(f"{series}/{name}", value, step)

    return send, writer.close


def _trackio(package: Any, folder: Path, settings: Row) -> Opened:
    package.init(project=PROJECT, name=folder.name, config=settings)

    def send(series: str, step: int, values: Mapping[str, float]) -> None:
        package.log({f"{series}/{name}": value for name, value in values.items()}, step=step)

    return send, package.finish


def _wandb(package: Any, folder: Path, settings: Row) -> Opened:
    folder.mkdir(parents=True, exist_ok=True)
    run = package.init(project=PROJECT, name=folder.name, config=settings, dir=str(folder))
    known: set[str] = set()

    def send(series: str, step: int, values: Mapping[str, float]) -> None:
        if series not in known:  # its own steps: every search begins at 0
            known.add(series)
            run.define_metric(f"{series}/*", step_metric=f"{series}/step")
        run.log({f"{series}/{k}": v for k, v in {**values, "step": step}.items()})

    return send, run.finish
