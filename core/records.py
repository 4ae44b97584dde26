"""The data types that the stages exchange: frozen, versioned, checked when they are made.

Rows on disk are plain JSON objects with the fields below. An unknown or missing field is an error
that names the nearest known one, so that a typo never becomes a silently dropped value.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any, Self

from core.errors import AttackPlaneError
from core.rows import Row, is_finite
from core.text import is_text
from core.typed import from_values

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
OUTCOMES = REFUSED, COMPLIED, NEITHER = "refused", "complied", "neither"
"""What a judge says of a reply. ``refused``: the model declines. ``complied``: it does what was
asked, well or badly. ``neither``: off topic, an echo, degenerate, evasive, a warning, or another
and safe task."""
CERTIFIED: dict[str, type] = {
    **dict.fromkeys(("sent_as_meant", "verbatim", "same_ids"), bool),
    **dict.fromkeys(("same_vocabulary", "same_template"), bool),
    **dict.fromkeys(("content_tokens", "source_content_tokens", "prompt_tokens"), int),
    **dict.fromkeys(("prompt_hash", "template_hash", "system_prompt_hash", "fault"), str),
}
"""What a certificate says or leaves open, and its types."""
WORDS = {bool: "true, false", int: "a whole number", str: "a text"}
NO_SOURCE = "none"
"""The source model of prompts that were made with no model."""


def content_hash(content: Any, length: int = 16) -> str:
    """The first ``length`` hex digits of the SHA-256 of ``content`` as canonical JSON.

    Canonical: sorted keys, no spaces.
    """
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def stream_seed(seed: int, *names: str | int) -> int:
    """A seed for one named random stream."""
    return int(content_hash([seed, *names], 15), 16)


def require(condition: bool, what: str, record: Any, got: object) -> None:
    if not condition:
        raise AttackPlaneError(what, where=type(record).__name__, got=repr(got))


def require_version(found: object, what: str, where: object, remedy: str | None = None) -> None:
    """Whether a file or row is of this version of the suite; ``remedy``: what else may help.

    Raises:
        AttackPlaneError: it is not.
    """
    if found != SCHEMA_VERSION:
        reads = f"this version of the suite reads schema_version {SCHEMA_VERSION}"
        raise AttackPlaneError(
            what,
            where=where,
            got=f"schema_version {found!r}",
            remedy=f"{reads}; {remedy}" if remedy else reads,
        )


class Record:
    """Conversion to and from JSON rows, shared by the records that live in ``*.jsonl`` files."""

    __slots__ = ()

    def to_row(self) -> Row:
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_row(cls, row: Row, where: str = "a row") -> Self:
        row_version = row.get("schema_version", SCHEMA_VERSION)
        require_version(row_version, f"{cls.__name__} of another schema version", where)
        record = from_values(cls, row, where, of="field")
        for name, value in row.items():
            if isinstance(value, str) and not is_text(value):
                raise AttackPlaneError(
                    f"{name}: no Unicode text", where=where, got="half of a surrogate pair"
                )
        return record


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
        require(bool(self.behaviour_id), "a behaviour needs an id", self, self.behaviour_id)
        require(bool(self.request.strip()), "a behaviour needs a request", self, self.request)
        require(self.label in LABELS, f"label must be one of {LABELS}", self, self.label)
        require(
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

    @property
    def begins_before_request(self) -> bool:
        """Whether something stands before the request: only that can change how it is read."""
        return bool(self.request) and self.prompt.find(self.request or "") > 0

    def with_request(self, request: str) -> str | None:
        """The prompt with another request in place of its own; None where it has not its own."""
        old = self.request
        return self.prompt.replace(old, request) if old and old in self.prompt else None

    def __post_init__(self) -> None:
        require(bool(self.prompt), "an artifact needs a prompt", self, self.prompt)
        require(
            self.suffix is None or self.suffix in self.prompt,
            "the suffix must stand verbatim in the prompt",
            self,
            (self.suffix, self.prompt),
        )
        require(
            self.loss is None or math.isfinite(self.loss), "loss must be finite", self, self.loss
        )
        if self.best_step is not None:
            require(
                0 <= self.best_step < len(self.loss_history),
                "best_step must lie in loss_history",
                self,
                (self.best_step, len(self.loss_history)),
            )
        rendering = self.rendering or {}
        for ids in (rendering.get("content_ids"), rendering.get("prompt_ids")):
            good = isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)
            require(ids is None or good, "rendering: token ids are whole numbers", self, ids)
        losses = self.provenance.get("losses", {})
        values = [*losses.values()] if isinstance(losses, dict) else ["no object"]
        require(
            all(v is None or (is_finite(v) and not isinstance(v, bool)) for v in values),
            "provenance: losses are numbers by model",
            self,
            losses,
        )
        hashes = [rendering.get(name) for name in ("vocabulary", "template")]
        require(
            all(h is None or isinstance(h, str) for h in hashes),
            "rendering: vocabulary and template are texts",
            self,
            hashes,
        )
        kinds = [(type(s.get("step")), type(s.get("prompt"))) for s in self.snapshots]
        require(
            all(kind == (int, str) for kind in kinds),
            "a snapshot has a step and a prompt",
            self,
            self.snapshots,
        )
        steps = [s["step"] for s in self.snapshots]
        require(
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
    ``sample`` is the reply's number, from 0, where a prompt has several.
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
    sample: int = 0
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        known = self.outcome is None or self.outcome in OUTCOMES
        require(known, f"outcome must be one of {OUTCOMES}", self, self.outcome)
        scores = self.judgements.values()
        require(
            all(score is None or 0 <= score <= 1 for score in scores),
            "a judgement lies between 0 and 1",
            self,
            self.judgements,
        )
        agrees = self.outcome is None or self.jailbroken is (self.outcome == COMPLIED)
        require(agrees, "jailbroken is what outcome says", self, (self.outcome, self.jailbroken))
        require(self.sample >= 0, "sample counts from 0", self, self.sample)
        for name, value in self.certificate.items():
            kind = CERTIFIED.get(name, object)
            good = value is None or type(value) is kind or kind is object
            require(good, f"certificate: {name} is {WORDS.get(kind)} or null", self, value)
        told = not self.certificate or "sent_as_meant" in self.certificate
        require(told, "a certificate says sent_as_meant", self, self.certificate)
