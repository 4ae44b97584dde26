"""The data types that the stages exchange: frozen, versioned, checked when they are made.

Rows on disk are plain JSON objects with the fields below. An unknown or missing field is an error
that names the nearest known one, so that a typo never becomes a silently dropped value.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from core.errors import AttackPlaneError
from core.rows import Row

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
SCHEMA_VERSION = 1
LABELS = HARMFUL, HARMLESS, PSEUDO_HARMFUL = "harmful", "harmless", "pseudo_harmful"
SPLITS = ("train", "validation", "test")
PLAIN, INITIAL_SUFFIX, RANDOM_SUFFIX = "plain", "initial_suffix", "random_suffix"
AUTODAN_SEED = "autodan_seed"
BASELINES = (PLAIN, INITIAL_SUFFIX, RANDOM_SUFFIX, AUTODAN_SEED)
"""Names of the classes that an optimised attack is compared with: nothing was optimised for
them."""
SEVERAL_SOURCES = " & "
"""Between the specs of an artifact that was optimised on several models."""
NO_SOURCE = "none"
"""The source model of prompts that were made with no model."""


def content_hash(content: Any, length: int = 16) -> str:
    """The first ``length`` hex digits of the SHA-256 of ``content`` as canonical JSON.

    Canonical: sorted keys, no spaces.
    """
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def nearest(name: str, known: list[str]) -> str:
    """A remedy that names the closest known word, or all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def config_from_dict(cls: type[T], values: Row, where: str) -> T:
    """Build a config dataclass; an unknown key is an error that names the nearest known one."""
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise AttackPlaneError(
                f"unknown setting {key!r}", where=where, remedy=nearest(key, known)
            )
    return cls(**values)


def _require(condition: bool, what: str, record: Any, got: object) -> None:
    if not condition:
        raise AttackPlaneError(what, where=type(record).__name__, got=repr(got))


class Record:
    """Conversion to and from JSON rows, shared by the records that live in ``*.jsonl`` files."""

    def to_row(self) -> Row:
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_row(cls, row: Row, where: str = "a row") -> Self:
        version = row.get("schema_version", SCHEMA_VERSION)
        if version != SCHEMA_VERSION:
            raise AttackPlaneError(
                f"{cls.__name__} of another schema version",
                where=where,
                got=version,
                remedy=f"this version of the suite reads schema_version {SCHEMA_VERSION}",
            )
        required = [
            f.name
            for f in dataclasses.fields(cls)  # type: ignore[arg-type]
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        missing = [name for name in required if name not in row]
        if missing:
            raise AttackPlaneError(
                f"{cls.__name__} lacks {', '.join(missing)}", where=where, got=sorted(row)
            )
        return config_from_dict(cls, row, where)


@dataclass(frozen=True)
class Behaviour(Record):
    """One request of a behaviour set.

    ``label`` is harmful, harmless or pseudo_harmful (safe, but with alarming words).
    ``target_string`` is the affirmative prefix that an optimising attack aims at, and the opening
    of a helpful reply to a harmless request; without one such an attack refuses the behaviour.
    ``pair_id`` is the same for a harmful request and the harmless one that is matched with it.
    """

    behaviour_id: str
    request: str
    target_string: str | None
    category: str
    label: str
    benchmark: str
    split: str | None = None
    pair_id: str | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def unit(self) -> str:
        """What is sampled: the matched pair, or the behaviour where it has none."""
        return self.pair_id or self.behaviour_id

    def __post_init__(self) -> None:
        _require(bool(self.behaviour_id), "a behaviour needs an id", self, self.behaviour_id)
        _require(bool(self.request.strip()), "a behaviour needs a request", self, self.request)
        _require(self.label in LABELS, f"label must be one of {LABELS}", self, self.label)
        _require(
            self.split is None or self.split in SPLITS,
            f"split must be one of {SPLITS}",
            self,
            self.split,
        )


@dataclass(frozen=True)
class AttackArtifact(Record):
    """One adversarial prompt, frozen: what ``transfer`` replays and ``verify`` scores anew.

    ``prompt`` is the user content, verbatim. ``suffix`` is its optimised part, exactly as it stands
    in ``prompt`` (a leading space belongs to it), and ``suffix_ids`` the tokens optimised. ``loss``
    is the mean negative log-likelihood of ``target_string`` in nats per target token on the source
    model, by one plain forward pass over the whole sequence. For an optimised attack the suffix is
    the best seen (or the one that matched the target, where that stops the search), at step
    ``best_step`` of ``loss_history`` (index 0 is the initial suffix), which holds the losses
    that the search saw: equal to rounding.
    ``token_fidelity`` says whether the whole rendered conversation, tokenised again from its text,
    gives the ids that were scored. ``faults`` is what was found wrong with the artifact when it was
    made, in words.

    ``variant`` tells prompts of one attack on one behaviour apart (the seed prompt, the technique).
    ``rendering`` is how the source model rendered the prompt: ``content_ids`` (token ids of the
    user content), ``vocabulary`` and ``template`` (hashes). ``snapshots`` are the prompts that were
    the best in turn, each {"step": index in ``loss_history``, "prompt"}.
    ``provenance`` is what else is known of how it was made; of an imported prompt: format, file,
    place, what the other tool said.
    """

    artifact_id: str
    behaviour_id: str
    attack: str
    source_model: str
    request: str
    prompt: str
    suffix: str | None
    suffix_ids: list[int] | None
    target_string: str | None
    loss: float | None
    loss_history: list[float]
    best_step: int | None
    seed: int
    config_hash: str
    token_fidelity: bool | None
    system_prompt: str | None = None
    faults: list[str] = field(default_factory=list)
    variant: str | None = None
    rendering: Row | None = None
    provenance: Row = field(default_factory=dict)
    snapshots: list[Row] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        _require(bool(self.prompt), "an artifact needs a prompt", self, self.prompt)
        _require(
            self.suffix is None or self.suffix in self.prompt,
            "the suffix must stand verbatim in the prompt",
            self,
            (self.suffix, self.prompt),
        )
        _require(
            self.loss is None or math.isfinite(self.loss), "loss must be finite", self, self.loss
        )
        if self.best_step is not None:
            _require(
                0 <= self.best_step < len(self.loss_history),
                "best_step must lie in loss_history",
                self,
                (self.best_step, len(self.loss_history)),
            )
        steps = [s["step"] for s in self.snapshots]
        _require(
            steps == sorted(steps) and all(0 <= step < len(self.loss_history) for step in steps),
            "snapshots must be of steps of loss_history, in order",
            self,
            (steps, len(self.loss_history)),
        )


@dataclass(frozen=True)
class Replay(Record):
    """A frozen prompt sent to a target model, with the reply and what each judge said.

    ``judgements`` maps judge to score in [0, 1] (1 = the model did what was asked) or None.
    ``outcome`` is what the first judge says: refused, complied or neither; ``jailbroken`` whether
    that is complied. None means not judged, never False.
    ``d`` and ``log_odds`` say how far the model leans towards refusing before it writes
    (``evaluation/refusal_score.py``); None in rows of earlier versions.
    ``certificate`` says what was sent, compared with what the source model saw; see
    ``transfer/certificate.py``.
    """

    replay_id: str
    artifact_id: str
    behaviour_id: str
    attack: str
    source_model: str
    target_model: str
    reply: str
    judgements: dict[str, float | None]
    jailbroken: bool | None
    config_hash: str
    certificate: Row = field(default_factory=dict)
    outcome: str | None = None
    d: float | None = None
    log_odds: float | None = None
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
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
    behaviour's plain request lies (None for plain requests and anchors).
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
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        _require(self.frame in ("base", "own"), "frame must be base or own", self, self.frame)
        _require(
            self.kind in ("attack", "anchor"), "kind must be attack or anchor", self, self.kind
        )


@dataclass(frozen=True)
class Activations:
    """Residual stream of prompts at named positions, before each block and after the last one.

    ``resid`` is (prompt, layer, position, d_model) float32 on the CPU, layer in 0..n_layers. A
    position that a prompt does not have (no request span, say) holds NaN.
    """

    resid: torch.Tensor
    positions: tuple[str, ...]
    prompt_ids: tuple[str, ...]
    model: str
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        shape = tuple(self.resid.shape)
        _require(len(shape) == 4, "resid must be (prompt, layer, position, d_model)", self, shape)
        _require(shape[0] == len(self.prompt_ids), "one prompt id a row of resid", self, shape)
        _require(shape[2] == len(self.positions), "one name a position of resid", self, shape)

    def at(self, position: str) -> torch.Tensor:
        """(prompt, layer, d_model) at one named position."""
        return self.resid[:, :, self.positions.index(position)]


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
            _require(
                bool((((lengths - 1).abs() < 1e-4) | (lengths == 0)).all()),
                f"{name} must be unit vectors, or zeros where the classes do not differ",
                self,
                lengths.tolist(),
            )

    @property
    def n_layers(self) -> int:
        return self.harmfulness.shape[0] - 1
