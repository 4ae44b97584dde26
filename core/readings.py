"""What was read of a model: residuals of prompts, directions, and points on the plane."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from core.records import SCHEMA_VERSION, Record, require
from core.rows import Row

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class PlanePoint(Record):
    """One prompt in the (harmfulness, refusal) plane of one model.

    ``x`` is the projection of the residual at t_inst on the harmfulness direction, ``y`` that at
    t_post_inst on the refusal direction, both at ``layer`` and relative to the harmless centroid of
    the frame's model, in units of the residual stream; ``x_cosine`` and ``y_cosine`` are cosines of
    the uncentred residual with the same directions.
    ``frame`` says whose directions: ``base`` or ``own``; the two ``cos_base_own_*`` tell how far
    those differ.
    ``kind`` is ``attack`` or ``anchor`` (a held-out plain prompt); ``class_name`` is what the point
    is drawn and summarised with: the attack (with its source, where that attack has several, and
    its label, unless harmful) or the anchor's label. ``plain_x`` and ``plain_y`` are where the same
    behaviour's plain request lies (None for plain requests and anchors). ``wrapper_x`` and
    ``wrapper_y`` say how far the wrapper alone moves: the same prompt with the matched harmless
    request in it, less that request by itself (None where there is none).
    ``position`` is where x is read: t_inst or t_goal.
    """

    prompt_id: str
    behaviour_id: str
    kind: str
    class_name: str
    label: str
    attack: str
    source: str
    target: str
    frame: str
    layer: int
    x: float
    y: float
    x_cosine: float
    y_cosine: float
    x_t_goal: float | None
    cos_base_own_harmfulness: float
    cos_base_own_refusal: float
    jailbroken: bool | None
    plain_x: float | None = None
    plain_y: float | None = None
    wrapper_x: float | None = None
    wrapper_y: float | None = None
    position: str = "t_inst"
    schema_version: int = SCHEMA_VERSION

    def to_row(self) -> Row:
        return {name: getattr(self, name) for name in self.__slots__}

    @property
    def moved(self) -> tuple[float, float] | None:
        """From the plain request to here."""
        if self.plain_x is None or self.plain_y is None:
            return None
        return self.x - self.plain_x, self.y - self.plain_y

    @property
    def wrapper(self) -> tuple[float, float] | None:
        """How far the wrapper alone moves."""
        if self.wrapper_x is None or self.wrapper_y is None:
            return None
        return self.wrapper_x, self.wrapper_y

    @property
    def beyond_wrapper(self) -> tuple[float, float] | None:
        """``moved`` less ``wrapper``: what a harmless request in the same wrapper does not show."""
        if self.moved is None or self.wrapper is None:
            return None
        return self.moved[0] - self.wrapper[0], self.moved[1] - self.wrapper[1]

    def __post_init__(self) -> None:
        require(self.frame in ("base", "own"), "frame must be base or own", self, self.frame)
        require(self.kind in ("attack", "anchor"), "kind must be attack or anchor", self, self.kind)


@dataclass(frozen=True)
class Activations:
    """Residual stream of prompts at named positions, before each block and after the last one.

    ``resid`` is (prompt, layer, position, d_model) float32 on the CPU, layer in 0..n_layers. A
    position that a prompt does not have (no request span, say) holds NaN. Where ``layers`` is
    given, only those were kept, in that order.
    """

    resid: torch.Tensor
    positions: tuple[str, ...]
    prompt_ids: tuple[str, ...]
    model: str
    schema_version: int = SCHEMA_VERSION
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.resid.shape)
        require(len(shape) == 4, "resid must be (prompt, layer, position, d_model)", self, shape)
        require(shape[0] == len(self.prompt_ids), "one prompt id a row of resid", self, shape)
        require(shape[2] == len(self.positions), "one name a position of resid", self, shape)
        named = self.layers is None or shape[1] == len(self.layers)
        require(named, "one number a layer of resid", self, shape)

    def at(self, position: str) -> torch.Tensor:
        """(prompt, layer, d_model) at one named position."""
        return self.resid[:, :, self.positions.index(position)]

    def of(self, layer: int, position: str) -> torch.Tensor:
        """(prompt, d_model) of one layer at one named position."""
        layers = range(self.resid.shape[1]) if self.layers is None else self.layers
        require(layer in layers, "this layer was not kept", self, layer)
        return self.at(position)[:, layers.index(layer)]


@dataclass(frozen=True)
class Directions:
    """Harmfulness and refusal directions of one model, one per layer, and what judges them.

    ``harmfulness`` and ``refusal`` are (n_layers + 1, d_model) float32, pointing from harmless to
    harmful (accepted to refused for the ``zhao`` refusal estimator). ``harmfulness_norm`` and
    ``refusal_norm`` (n_layers + 1) are lengths of the mean differences before normalising.
    ``harmless_t_inst`` and ``harmless_t_post_inst`` (n_layers + 1, d_model) are the harmless
    centroids. ``statistics`` maps a name to (n_layers + 1) numbers, or to (n_layers + 1, 2) for the
    ends of a 95 % interval; see ``geometry.directions.estimate``.
    """

    model: str
    estimator: str
    harmfulness: torch.Tensor
    refusal: torch.Tensor
    harmfulness_norm: torch.Tensor
    refusal_norm: torch.Tensor
    harmless_t_inst: torch.Tensor
    harmless_t_post_inst: torch.Tensor
    sample_counts: dict[str, int]
    statistics: dict[str, torch.Tensor] = field(default_factory=dict)
    settings: Row = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    TENSORS: ClassVar[tuple[str, ...]] = (
        "harmfulness",
        "refusal",
        "harmfulness_norm",
        "refusal_norm",
        "harmless_t_inst",
        "harmless_t_post_inst",
    )

    def __post_init__(self) -> None:
        for name in ("harmfulness", "refusal"):
            lengths = getattr(self, name).norm(dim=-1)
            require(
                bool((((lengths - 1).abs() < 1e-4) | (lengths == 0)).all()),
                f"{name} must be unit vectors, or zeros where the classes do not differ",
                self,
                lengths.tolist(),
            )

    @property
    def n_layers(self) -> int:
        return self.harmfulness.shape[0] - 1
