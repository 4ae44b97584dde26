"""What an attack works with: source models, helper models, the random stream, where it saves.

A ``Workbench`` serves all requests of one campaign, so that a helper model is loaded once. A
``Task`` is one request on it. Each request has a random stream of its own, so neither the order nor
the choice of requests changes a result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from core.prompt import Renderer
from core.records import Behaviour
from core.rows import Row
from evaluation.judges import Judge, make_judge

if TYPE_CHECKING:  # attacks are listed, and their options shown, without torch
    from torch import Tensor

    from core.chat import ChatModel
    from core.models import LoadedModel, ModelHandle, OpenModel

T = TypeVar("T")


class States(Protocol):
    """Where a search in progress is kept, by name; what is loaded goes on to the bit."""

    def load(self, name: str) -> Row | None: ...

    def save(self, name: str, state: Callable[[], Row]) -> None: ...

    def drop(self, name: str) -> None: ...


class NoStates:
    """Keeps nothing: for searches outside a run folder."""

    def load(self, name: str) -> Row | None:
        return None

    def save(self, name: str, state: Callable[[], Row]) -> None:
        pass

    def drop(self, name: str) -> None:
        pass


@dataclass(frozen=True)
class Progress:
    """Where a search stands.

    ``loss`` and ``best`` are nats per target token. PAIR has no loss; there both are 1 minus the
    judge's score, from 0 to 1.
    """

    step: int
    steps: int
    loss: float
    best: float


def _plain_handle(spec: str) -> ModelHandle:
    from core.models import ModelHandle

    return ModelHandle(spec)


@dataclass
class Workbench:
    """Models and tools of one attack over any number of requests.

    Use as a context manager where helpers must be closed at the end.
    """

    sources: Sequence[ModelHandle] = ()
    behaviours: Sequence[Behaviour] = ()
    """All requests of the campaign: a universal suffix is optimised on several of them."""
    seed: int = 0
    states: States = field(default_factory=NoStates)
    open_model: OpenModel = _plain_handle
    used: dict[str, ModelHandle] = field(default_factory=dict)
    """Helper models that results depend on, by spec."""

    def __post_init__(self) -> None:
        self._kept: dict[Any, Any] = {}
        self._open: list[Any] = []
        self._stack = ExitStack()

    def __enter__(self) -> Workbench:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        for key in self._open:
            self._kept.pop(key, None)
        self._open.clear()

    @property
    def source(self) -> LoadedModel:
        """The source model, or the first of several."""
        return self.sources[0].loaded

    @cached_property
    def renderer(self) -> Renderer:
        """Renders for the source model."""
        return Renderer(self.source)

    def once(self, key: object, make: Callable[[], T]) -> T:
        """``make()`` the first time, the same object afterwards."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def entered(self, key: object, make: Callable[[], AbstractContextManager[T]]) -> T:
        """As ``once``, for what must be closed when the workbench closes."""
        if key not in self._kept:
            self._kept[key] = self._stack.enter_context(make())
            self._open.append(key)
        return self._kept[key]

    def allowed(self, *, ascii_only: bool) -> Tensor:
        """(vocabulary,) bool: the tokens that a suffix may hold."""
        from attacks.candidates import allowed_tokens

        table, tokenizer = self.source.embedding_table, self.source.tokenizer
        return self.once(
            ("allowed", ascii_only),
            lambda: allowed_tokens(tokenizer, table.shape[0], ascii_only=ascii_only),
        )

    def model(self, spec: str) -> ModelHandle:
        """A helper model, which results depend on."""
        self.used[spec] = self.once(("model", spec), lambda: self.open_model(spec))
        return self.used[spec]

    def chat(self, spec: str) -> ChatModel:
        """A model that writes text; the source model itself where it has this spec."""
        from core.chat import open_chat

        return self.once(("chat", spec), lambda: open_chat(spec, self.sources, self.open_model))

    def judge(self, spec: str) -> Judge:
        return self.once(("judge", spec), lambda: make_judge(spec))


@dataclass(frozen=True)
class Task:
    """One request, and what its attack tells while it works.

    Attributes:
        behaviour: the request.
        key: names the state of a search in progress.
        save_every: steps between two saves of that state.
        on_step: called after every step.
        there: the prompts, by (name, variant), that need not be made again.
    """

    behaviour: Behaviour
    key: str = ""
    save_every: int = 1
    on_step: Callable[[Progress], None] = lambda progress: None
    there: frozenset[tuple[str, str | None]] = frozenset()

    @property
    def target(self) -> str:
        """The target string of an attack that needs one."""
        assert self.behaviour.target_string is not None
        return self.behaviour.target_string


def judge_first(bench: Workbench, config: Any) -> None:
    """A check for attacks with a judge: one that cannot be made would stop them after a step."""
    bench.judge(config.judge)
