"""Models that write text for an attack: a local model, or a server with OpenAI's chat protocol.

Specs: a model spec (see ``core/models.py``), or ``http://HOST:PORT/v1#MODEL`` (https too; the key
is read from the variable OPENAI_API_KEY and sent over https, or to this machine, only).
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Protocol

from core.errors import AttackPlaneError
from core.generate import complete
from core.models import ModelHandle, OpenModel
from core.prompt import Conversation, Renderer
from core.rows import Row

Message = tuple[str, str]
"""(role, content); roles are system, user and assistant."""
TRIES = 3
LOCAL = ("localhost", "127.0.0.1", "[::1]")
"""Hosts that get the key without encryption."""


class ChatModel(Protocol):
    spec: str
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
    """A server with ``POST /chat/completions``. Failing requests are repeated at first."""

    def __init__(self, spec: str, *, timeout: float = 120.0, pause: float = 1.0) -> None:
        self.spec = self.identity = spec
        self.url, _, self.model = spec.partition("#")
        self.timeout, self.pause = timeout, pause
        if not self.model:
            raise AttackPlaneError(
                "a server spec needs its model's name",
                got=spec,
                remedy="write http://HOST:PORT/v1#MODEL",
            )

    def replies(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        opening: str = "",
    ) -> list[str]:
        def one(number: int, messages: Sequence[Message]) -> str:
            return self._ask(
                {
                    "model": self.model,
                    "messages": [{"role": role, "content": text} for role, text in messages],
                    "max_tokens": max_new_tokens,
                    "temperature": temperature,
                    "seed": seed + number,  # the same question twice shall not get the same reply
                }
            )

        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(one, range(len(conversations)), conversations))

    def _ask(self, body: Row) -> str:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
        )
        key = os.environ.get("OPENAI_API_KEY")
        if key and (self.url.startswith("https://") or request.host.split(":")[0] in LOCAL):
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        fault: object = None
        for attempt in range(TRIES):
            if attempt:
                time.sleep(self.pause * 2**attempt)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return str(json.load(answer)["choices"][0]["message"]["content"] or "").strip()
            except urllib.error.HTTPError as error:
                fault = f"HTTP {error.code}: {error.read(200).decode(errors='replace')}"
                if error.code < 500 and error.code != 429:
                    break
            except (
                urllib.error.URLError,
                http.client.HTTPException,
                TimeoutError,
                ConnectionError,
            ) as error:
                fault = error
            except (ValueError, KeyError, IndexError, TypeError) as error:
                fault = f"not an answer of OpenAI's chat protocol ({type(error).__name__}: {error})"
        raise AttackPlaneError(
            "the server gave no reply",
            where=self.spec,
            got=fault,
            remedy=(
                "check address, model name and OPENAI_API_KEY; the same command goes on from here"
            ),
        )


def open_chat(
    spec: str, have: Sequence[ModelHandle] = (), open_model: OpenModel = ModelHandle
) -> ChatModel:
    """The chat model of a spec; a model that is named already is not loaded twice."""
    if spec.startswith(("http://", "https://")):
        return ServerChat(spec)
    return LocalChat(
        next((model for model in have if model.spec == spec), None) or open_model(spec)
    )
