"""One model in front of the contrast set: prompts, its own replies, who was refused, residuals.

Everything is read when it is first asked for, and once: the directions stage and a study of the
same model share one reading. Replies are kept in the run folder, as they were made; they are judged
when they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

from typing_extensions import TypedDict

from core.generate import complete
from core.models import LoadedModel, ModelHandle
from core.prompt import Conversation, Prompt, Renderer
from core.readings import Activations
from core.records import HARMFUL, Behaviour, content_hash
from core.rows import Row
from core.settings import LARGEST, check_settings, setting
from core.store import RunFolder, sealed
from evaluation.behaviours import (
    BUILT_IN,
    CONTRAST_SPLITS,
    DEMONSTRATION,
    load_behaviours,
    recorded_name,
)
from evaluation.judges import QUICK_JUDGE, REFUSED, REFUSES, Exchange, make_judge, outcomes
from geometry.activations import POSITIONS, collect

CONTRAST = "contrast.jsonl"
TEMPLATES = ("chat", "raw")


@dataclass(frozen=True)
class DirectionsConfig:
    """What directions are estimated on, and how.

    ``reply_tokens``: of the model's own replies, which say refused or accepted by ``judge``.
    ``resamples``: bootstrap samples, permutations and random directions each. ``template``: raw
    leaves out what the model's chat template puts before the first turn by itself.
    """

    contrast: str = DEMONSTRATION
    splits: tuple[str, ...] = CONTRAST_SPLITS
    reply_tokens: int = setting(32, "New tokens of the model's own replies.", low=1)
    resamples: int = setting(200, "Bootstrap samples, permutations, random directions.", low=20)
    seed: int = setting(0, "Random seed.", low=0, high=LARGEST)
    system_prompt: str | None = None
    judge: str = QUICK_JUDGE
    template: str = setting(TEMPLATES[0], "Chat template or raw.", choices=TEMPLATES)

    def __post_init__(self) -> None:
        check_settings(self, "directions")

    def to_settings(self) -> Row:
        """For a run's manifest. The judge may change: replies are judged when they are read."""
        settings = {k: v for k, v in self.identity().items() if k != "judge"}
        return settings | {"contrast": recorded_name(self.contrast)}

    def identity(self) -> Row:
        """All fields. The usual template is left out: runs made before there was a choice go on."""
        settings = asdict(self)
        if self.template == TEMPLATES[0]:
            del settings["template"]
        return settings


def splits_of(behaviours: str, splits: Sequence[str], default: Sequence[str]) -> tuple[str, ...]:
    """The splits asked for; without any, the default of a built-in set, else all."""
    return tuple(splits) or (tuple(default) if behaviours in BUILT_IN else ())


def contrast_set(config: DirectionsConfig) -> list[Behaviour]:
    """Harmful behaviours, then harmless ones."""
    both = [
        load_behaviours(config.contrast, label=label, splits=config.splits)
        for label in ("harmful", "harmless")
    ]
    return both[0] + both[1]


def rendered(
    renderer: Renderer, behaviours: Sequence[Behaviour], system: str | None
) -> list[Prompt]:
    """The plain requests of behaviours as a model reads them."""
    return [renderer.render(Conversation.build(b.request, system=system)) for b in behaviours]


class _Replies(TypedDict):
    made_from: str
    replies: dict[str, str]


class ContrastReading:
    """One model in front of the contrast set. Use within the run's lock.

    Args:
        positions: where residuals are read. Names counted from the end of the prompt are left out
            where a prompt is too short for them.
    """

    def __init__(
        self,
        run: RunFolder,
        model: ModelHandle,
        config: DirectionsConfig,
        *,
        behaviours: Sequence[Behaviour] | None = None,
        positions: Sequence[str] = POSITIONS,
    ) -> None:
        self.run, self.model, self.config = run, model, config
        self.behaviours = list(behaviours or contrast_set(config))
        self.harmful = [b.label == HARMFUL for b in self.behaviours]
        self._positions = positions

    @property
    def made_from(self) -> str:
        """Stands for all that directions depend on; needs no weights."""
        requests = [(b.request, b.unit) for b in self.behaviours]
        return content_hash([self.config.identity(), self.model.fingerprint, requests])

    @property
    def loaded(self) -> LoadedModel:
        return self.model.loaded

    @cached_property
    def renderer(self) -> Renderer:
        return Renderer(self.loaded, raw=self.config.template == "raw")

    @cached_property
    def prompts(self) -> list[Prompt]:
        return rendered(self.renderer, self.behaviours, self.config.system_prompt)

    @cached_property
    def replies(self) -> list[str]:
        """The model's own greedy reply to each prompt, made once per run."""
        about = [self.model.fingerprint, self.config.reply_tokens, self.config.system_prompt]
        about += [self.config.template] if self.config.template != TEMPLATES[0] else []
        asked = [(b.behaviour_id, b.request) for b in self.behaviours]
        made_from = content_hash([*about, asked])
        there = self.run.checked(CONTRAST, _Replies, "remove that line; its replies are made anew")
        rows = [row for row in there if row["made_from"] == made_from]
        if not rows:
            made = complete(
                self.renderer,
                [prompt.text for prompt in self.prompts],
                max_new_tokens=self.config.reply_tokens,
                description="own replies",
            )
            ids = [b.behaviour_id for b in self.behaviours]
            row = {
                "made_from": made_from,
                "model": self.model.spec,
                "replies": dict(zip(ids, made, strict=True)),
            }
            self.run.append(CONTRAST, sealed(row))
            rows = [row]
        return [rows[0]["replies"][b.behaviour_id] for b in self.behaviours]

    @property
    def refused(self) -> list[bool | None]:
        """Whether each reply refused; None where it did neither, or the judge cannot say."""
        return [REFUSES.get(outcome or "") for outcome in self.outcomes]

    def refusals(self, *, harmful: bool) -> tuple[int, int]:
        """How many prompts of one label the model refuses, of how many that were judged."""
        pairs = zip(self.outcomes, self.harmful, strict=True)
        known = [outcome for outcome, own in pairs if own is harmful and outcome is not None]
        return known.count(REFUSED), len(known)

    @cached_property
    def outcomes(self) -> list[str | None]:
        """What the judge says of each reply."""
        exchanges = [
            Exchange(b.request, reply, b.target_string)
            for b, reply in zip(self.behaviours, self.replies, strict=True)
        ]
        return outcomes(make_judge(self.config.judge), exchanges)

    @cached_property
    def activations(self) -> Activations:
        """Residuals at the positions that every prompt has."""
        shortest = min(len(prompt.ids) for prompt in self.prompts)
        present = [p for p in self._positions if not p.startswith("-") or int(p) >= -shortest]
        return collect(
            self.loaded,
            self.prompts,
            [b.behaviour_id for b in self.behaviours],
            positions=present,
            description="contrast prompts",
        )
