"""Models that write text for an attack: a local model, or a served one (``core/served.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

from core.generate import complete
from core.models import ModelHandle, OpenModel
from core.prompt import Conversation, Renderer
from core.served import Message, Question, Server


class ChatModel(Protocol):
    spec: str
    local: bool
    """Whether it is a model of ours, whose reply can be made to begin in some way."""
    identity: str
    """What a result depends on: the spec, and a local model's fingerprint."""

    def replies(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        opening: str = "",
    ) -> list[str]:
        """A reply to each conversation, whose last message is the user's.

        ``opening`` is how a reply begins (local models only). It is not repeated in what comes
        back.
        """
        ...


class LocalChat:
    """A model of ours as a chat model; it is loaded with its first reply."""

    local = True

    def __init__(self, model: ModelHandle) -> None:
        self.spec, self._model = model.spec, model
        self.identity = f"{model.spec} {model.fingerprint}"

    @cached_property
    def renderer(self) -> Renderer:
        return Renderer(self._model.loaded)

    def replies(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        opening: str = "",
    ) -> list[str]:
        texts = []
        for messages in conversations:
            turns = [m for m in messages if m[0] != "system"]
            system = "\n\n".join(text for role, text in messages if role == "system") or None
            conversation = Conversation(
                turns[-1][1].strip(), system=system, history=tuple(turns[:-1])
            )
            texts.append(self.renderer.text(conversation) + opening)
        return complete(
            self.renderer,
            texts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            description=self.spec[-30:],
        )


class ServerChat:
    """A served model as a chat model."""

    local = False

    def __init__(self, server: Server) -> None:
        self.server, self.spec = server, server.spec
        self.identity = server.spec

    def replies(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        opening: str = "",
    ) -> list[str]:
        questions = [  # the same question twice shall not get the same reply
            Question(messages, max_new_tokens, temperature, seed + number)
            for number, messages in enumerate(conversations)
        ]
        return [answer.text for answer in self.server.answers(questions)]


def open_chat(
    spec: str, have: Sequence[ModelHandle] = (), open_model: OpenModel = ModelHandle
) -> ChatModel:
    """The chat model of a spec; a model that is named already is not loaded twice."""
    model = next((model for model in have if model.spec == spec), None) or open_model(spec)
    return ServerChat(model.server) if model.server else LocalChat(model)
