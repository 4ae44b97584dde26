"""Prompts that come with a chat template baked in, unwrapped into user content.

Sent as they are they would stand inside the target's own template, which is another prompt than the
tool meant.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

S = r"\s*"
FORMS: dict[str, str] = {
    # name: the whole prompt as an expression with the groups user and, where there is one, system
    "chatml": (
        r"(?:<\|im_start\|>system\n(?P<system>.*?)<\|im_end\|>\s*)?"
        r"<\|im_start\|>user\n(?P<user>.*?)<\|im_end\|>"
        r"\s*(?:<\|im_start\|>assistant\s*)?"
    ),
    "llama-3": (
        r"(?:<\|begin_of_text\|>)?\s*"
        r"(?:<\|start_header_id\|>system<\|end_header_id\|>\s*(?P<system>.*?)<\|eot_id\|>)?\s*"
        r"<\|start_header_id\|>user<\|end_header_id\|>\s*(?P<user>.*?)<\|eot_id\|>\s*"
        r"(?:<\|start_header_id\|>assistant<\|end_header_id\|>\s*)?"
    ),
    "llama-2": (
        r"(?:<s>)?\s*\[INST\]\s*(?:<<SYS>>\s*(?P<system>.*?)\s*<</SYS>>\s*)?"
        r"(?P<user>.*?)\s*\[/INST\]\s*"
    ),
    "gemma": (
        r"(?:<bos>)?\s*<start_of_turn>user\n(?P<user>.*?)<end_of_turn>"
        r"\s*(?:<start_of_turn>model\s*)?"
    ),
    "zephyr": (
        r"(?:<\|system\|>\s*(?P<system>.*?)(?:</s>|<\|end\|>)\s*)?"
        r"<\|user\|>\s*(?P<user>.*?)(?:</s>|<\|end\|>)?\s*<\|assistant\|>\s*"
    ),
    "vicuna": r"(?P<system>A chat between .*?)\s*USER: (?P<user>.*?)\s*ASSISTANT:\s*",
    "alpaca": (
        r"(?P<system>Below is an instruction.*?)\s*### Instruction:\s*(?P<user>.*?)"
        r"\s*### Response:\s*"
    ),
}
DECODED = "decoded, its special tokens lost"
"""A template of which only its role names are left, as ``skip_special_tokens`` leaves them."""
FORMS[DECODED] = (
    r"(?:system\n+(?P<system>.*?)\n+)?user\n+(?P<user>.*?)\n*(?<=\n)(?:assistant|model)\s*"
)
RESIDUE = re.compile(r"\A(?:system|user)\n|\n(?:assistant|model)\s*\Z")
COMPILED = {name: re.compile(form, re.DOTALL) for name, form in FORMS.items()}
MARKERS = re.compile(
    r"<\|im_(?:start|end)\|>|<\|(?:start|end)_header_id\|>|<\|eot_id\|>|<\|begin_of_text\|>"
    r"|\[/?INST\]|<</?SYS>>"
    r"|<(?:start|end)_of_turn>|<\|(?:system|user|assistant)\|>|\bUSER: .*\bASSISTANT:|### "
    r"Instruction:.*### Response:",
    re.DOTALL,
)


@dataclass(frozen=True)
class Unwrapped:
    """A prompt without its template.

    ``form`` is the template's name, None where there was none or it could not be unwrapped.
    ``fault`` says why.
    """

    content: str
    system: str | None = None
    form: str | None = None
    fault: str | None = None


def unwrap(prompt: str) -> Unwrapped:
    """User content, and system prompt, of a prompt.

    A prompt with markers of no known form is kept as it is, and marked.
    """
    if not MARKERS.search(prompt) and not RESIDUE.search(prompt):
        return Unwrapped(prompt)
    for name, form in COMPILED.items():
        match = form.fullmatch(prompt.strip())
        if match and (user := match["user"]).strip() and not MARKERS.search(user):
            system = match.groupdict().get("system")
            return Unwrapped(user, system.strip() if system and system.strip() else None, name)
    marker = MARKERS.search(prompt) or RESIDUE.search(prompt)
    assert marker
    return Unwrapped(
        prompt, fault=f"a chat template is baked in and was not unwrapped ({marker.group()[:20]!r})"
    )
