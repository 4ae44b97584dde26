"""HARC: couples harmful prompts with both directions, in weights (arXiv 2607.00572).

    L = L_prompt + L_response + 10 KL + CE

    L_prompt    mean over chosen layers of the hinges (``losses.coupling_loss``) at two positions:
                h at t_post_inst with v_ref, and h at t_inst with v_harm
    L_response  the same form on the mean of a reply's first 32 tokens, with v_ref_resp and
                v_harm_resp: harmful continuations against ordinary replies
    KL          KL(base || tuned) over ordinary replies, mean over tokens
    CE          cross-entropy of refusals to harmful requests

Steps:

1. On the base, estimate the four directions at every layer; v_harm_resp = n(continuation -
   ordinary), v_ref_resp = n(refusal - ordinary), as in the official code. Choose the layers with
   the highest Eq. 6.
2. A micro-batch is 6 harmful, 4 harmless and 2 pseudo-harmful requests.
3. Every so many micro-batches estimate the directions anew on the tuned model, and blend:
   v <- n(0.7 v_base + 0.3 v_now).

Directions point towards harmful and towards refused. They are constants: no gradient flows into
them. ``directions`` chooses controls in their place, at the same layers: ``permuted`` (the same
estimate, the labels of the classes dealt anew) and ``random`` (unit vectors, never estimated anew).
"""

from __future__ import annotations

from dataclasses import dataclass

from attacks.registry import Speed
from core.records import HARMFUL, HARMLESS, PSEUDO_HARMFUL
from core.settings import setting
from training.config import TrainConfig, published
from training.registry import ARMS, Arm, Bench, Method, update_cost

TERMS = ("full", "prompt", "response", "ce_kl", "ce")
POSITIONS = ("both", "t_inst", "t_post_inst")
DIRECTIONS = ("harc", "permuted", "random")


@dataclass(frozen=True)
class HARCConfig(TrainConfig):
    """The official code's. Its 400 micro-batches are 200 updates of two."""

    num_steps: int = published(TrainConfig, "num_steps", 200)
    accumulation: int = published(TrainConfig, "accumulation", 2)
    batch_size: int = published(TrainConfig, "batch_size", 6)
    learning_rate: float = published(TrainConfig, "learning_rate", 1e-4)
    schedule: str = published(TrainConfig, "schedule", "constant")
    warmup_steps: int = published(TrainConfig, "warmup_steps", 50)
    lora_rank: int = published(TrainConfig, "lora_rank", 32)
    lora_alpha: int = published(TrainConfig, "lora_alpha", 64)
    lora_dropout: float = published(TrainConfig, "lora_dropout", 0.0)
    all_linear: bool = published(TrainConfig, "all_linear", True)
    harmless: int = setting(4, "Harmless requests of a micro-batch (--batch-size: harmful).", low=1)
    pseudo_harmful: int = setting(2, "Pseudo-harmful requests of a micro-batch.", low=0)
    margin: float = setting(
        0.5, "Cosine that harmful states are pushed to (0.3 in the code).", low=0, high=1
    )
    layers: int = setting(2, "Layers, the best by Eq. 6 (later runs of the paper: 4).", low=1)
    coupling_weight: float = setting(1.0, "Of L_prompt and L_response.", low=0)
    kl_weight: float = setting(10.0, "Of the KL term.", low=0)
    reestimate_every: int = setting(200, "Micro-batches between estimates.", low=1)
    keep: float = setting(0.7, "Weight of the base's direction in the blend.", low=0, high=1)
    samples: int = setting(300, "Requests a class in an estimate, at most.", low=4)
    terms: str = setting("full", "Which terms: an ablation of the paper.", choices=TERMS)
    positions: str = setting("both", "Prompt positions that are coupled.", choices=POSITIONS)
    directions: str = setting("harc", "Its directions, or a control's.", choices=DIRECTIONS)
    opened: bool = setting(False, "Hold ordinary replies that open as harmful ones do too.")


def method(bench: Bench, config: HARCConfig) -> Method:
    from training.harc_method import HARC

    return HARC(bench, config).method


def cost(config: HARCConfig, speed: Speed) -> float:
    """Refusals and continuations of as many harmful requests, and ordinary ones beside the base."""
    ordinary = config.harmless + config.pseudo_harmful
    learnt = 2 * config.batch_size + ordinary
    return update_cost(config, speed, learnt=learnt, frozen=ordinary)


ARM = ARMS.add(
    Arm(
        name="harc",
        summary="Couple harmful prompts with harmfulness and refusal directions (HARC).",
        config=HARCConfig,
        method=method,
        needs=(HARMFUL, HARMLESS, PSEUDO_HARMFUL),
        cost=cost,
        source="arXiv 2607.00572 and its official code",
        small={
            "batch_size": 4,
            "harmless": 3,
            "pseudo_harmful": 1,
            "accumulation": 1,
            "learning_rate": 1e-3,
            "coupling_weight": 20.0,
            "reestimate_every": 50,
        },
        examples=(
            "train harc --out runs/harc --preset small",
            "train harc --out runs/harc-permuted --preset small --directions permuted",
        ),
    )
)
