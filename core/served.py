"""A model behind a server that speaks OpenAI's protocol: vLLM, llama.cpp, Ollama, a company's.

    http://HOST:PORT/v1#MODEL[?OPTION=NUMBER&...]      (https too)

Options: ``at_once`` (requests at the same time), ``per_minute`` (at most so many; 0: no limit),
``timeout`` (seconds of one try), ``tries`` (of one request), ``price_in`` and ``price_out`` (of a
million tokens, in any currency). They say how the server is asked, and are no part of its name.

The key is read from OPENAI_API_KEY. It is sent over https, or to this machine, only.

What a server does not tell is not guessed. Where it has vLLM's ``/tokenize``, the token ids of the
prompt are asked for, and these ids are what is sent. Else the conversation is sent, and the
server's own template makes of it what it makes.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from core.errors import AttackPlaneError
from core.records import content_hash
from core.rows import Row

if TYPE_CHECKING:
    from openai import OpenAI

Message = tuple[str, str]
"""(role, content); roles are system, user and assistant."""
FORM = "http://HOST:PORT/v1#MODEL"
LOCAL = ("localhost", "127.0.0.1", "::1")
"""Hosts that get the key without encryption."""
TO_ALL = (401, 403, 404)
"""Refusals that every other question would get too."""
BUSY = (408, 409, 425, 429)
"""Refusals that a later try may not get."""
NEWER_LENGTH = "max_completion_tokens"
"""What newer servers call the length of a reply; they say so when they refuse ``max_tokens``."""
PAUSE, LONGEST_PAUSE = 0.5, 60.0
"""Seconds before the second try, twice as many before each further one; and at most."""
T = TypeVar("T")


@dataclass(frozen=True)
class ServerSpec:
    """A parsed spec of a served model. ``text`` is its name in runs: without the options."""

    text: str
    url: str
    model: str
    at_once: int = 4
    per_minute: float = 0.0
    timeout: float = 120.0
    tries: int = 5
    price_in: float = 0.0
    price_out: float = 0.0


OPTIONS = tuple(f.name for f in fields(ServerSpec)[3:])
MAY_BE_ZERO = ("per_minute", "price_in", "price_out")


def is_served(spec: str) -> bool:
    """Whether a spec names a served model."""
    return spec.strip().startswith(("http://", "https://"))


def parse_server(text: str) -> ServerSpec:
    """Parse the spec of a served model.

    Raises:
        AttackPlaneError: no model's name, an unknown option, or a bad value.
    """
    name, mark, query = text.strip().partition("?")
    url, _, model = name.partition("#")
    host = None
    with suppress(ValueError):  # brackets that hold no address, or no port
        host, _ = urlsplit(url).hostname, urlsplit(url).port
    if not model or not host:
        what = "a server spec needs an address and its model's name"
        raise AttackPlaneError(what, got=text, remedy=f"write {FORM}")
    options: Row = {}
    for pair in query.split("&") if mark else ():
        key, _, value = pair.partition("=")
        try:
            number = float(value) if key not in ("at_once", "tries") else int(value)
        except ValueError:
            number = -1
        fits = 0 < number < 1e6 or (number == 0 and key in MAY_BE_ZERO)
        if key in options or key not in OPTIONS or not fits:
            raise AttackPlaneError(
                "no option of a server, one given twice, or no number that it takes",
                where=f"model spec {text!r}",
                got=pair or "nothing between ?, & and the end",
                remedy=f"options: {', '.join(OPTIONS)}; numbers above 0",
            )
        options[key] = number
    return ServerSpec(name, url.rstrip("/"), model, **options)


@dataclass(frozen=True)
class Question:
    """What a served model is asked."""

    messages: Sequence[Message]
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """A reply, and what the server said of it; None where it did not say.

    Attributes:
        text: the reply, without white space around it.
        finish: why it ended, in the server's words: stop, length, content_filter.
        prompt_tokens, reply_tokens: as the server counts them.
        served_by: the name of the model that the server says has answered.
        prompt_ids: the token ids that were sent, where the server takes ids.
        cost: by the prices of the spec; None without prices.
    """

    text: str
    finish: str | None = None
    prompt_tokens: int | None = None
    reply_tokens: int | None = None
    served_by: str | None = None
    prompt_ids: list[int] | None = None
    cost: float | None = None


class Unanswered(AttackPlaneError):
    """The server refused a question. Others may be answered, but for those of ``TO_ALL``."""

    code: int = 0


class Server:
    """A served model. Several threads may ask it."""

    def __init__(self, spec: str) -> None:
        self.parsed = parse_server(spec)
        self.spec = self.parsed.text
        self.fingerprint = content_hash(["served", self.spec])
        """Stands for the name: whether the weights behind it stay the same is not known."""
        self._turns, self._next_turn = threading.Lock(), 0.0
        self._stopped = threading.Event()
        self._length_name = "max_tokens"
        self._takes_ids = True  # until it turns out otherwise

    @cached_property
    def _client(self) -> OpenAI:
        try:
            from openai import OpenAI
        except ImportError as error:
            raise AttackPlaneError(
                "the client of served models is not installed",
                where=self.spec,
                remedy="pip install 'attack-plane[servers]'",
            ) from error
        address = urlsplit(self.parsed.url)
        safe = address.scheme == "https" or address.hostname in LOCAL
        return OpenAI(
            base_url=self.parsed.url,
            api_key=(os.environ.get("OPENAI_API_KEY") if safe else None) or "none",
            timeout=self.parsed.timeout,
            max_retries=0,  # ours also wait for their turn, and repeat what is no JSON
        )

    # --- many questions ---------------------------------------------------------------------------
    def ask_all(
        self, questions: Iterable[Question]
    ) -> Iterator[list[tuple[int, Answer | Unanswered]]]:
        """(number of the question, answer) of all questions, as they come, ``at_once`` together.

        What one question alone is refused is given in place of its answer.

        Raises:
            AttackPlaneError: the server does not answer. What it had answered is given before.
        """
        waiting: dict[Future[Answer], int] = {}
        numbered, fault = iter(enumerate(questions)), None
        pool = ThreadPoolExecutor(self.parsed.at_once)
        try:
            while True:
                while fault is None and len(waiting) < self.parsed.at_once:
                    number, question = next(numbered, (-1, None))
                    if question is None:
                        break
                    waiting[pool.submit(self.ask, question)] = number
                if not waiting:
                    break
                given: list[tuple[int, Answer | Unanswered]] = []
                for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                    number = waiting.pop(done)
                    try:
                        given.append((number, done.result()))
                    except AttackPlaneError as error:
                        if isinstance(error, Unanswered) and error.code not in TO_ALL:
                            given.append((number, error))
                        else:
                            fault = fault or error
                if given:
                    yield given
        finally:
            if waiting:  # the caller has stopped: nobody waits for these
                self._stopped.set()
                self._client.close()
                vars(self).pop("_client")
            pool.shutdown(cancel_futures=True)
            self._stopped.clear()
        if fault:
            raise fault

    def answers(self, questions: Sequence[Question]) -> list[Answer]:
        """The answers to all questions, in their order.

        Raises:
            AttackPlaneError: one is refused, or the server does not answer.
        """
        found: dict[int, Answer] = {}
        for number, answer in (pair for part in self.ask_all(questions) for pair in part):
            if isinstance(answer, Unanswered):
                raise answer
            found[number] = answer
        return [found[number] for number in range(len(questions))]

    # --- one question -----------------------------------------------------------------------------
    def ask(self, question: Question) -> Answer:
        """The answer to one question.

        Raises:
            Unanswered: the server refuses it.
            AttackPlaneError: no answer in any try.
        """
        settings = {"temperature": question.temperature, "seed": question.seed}
        ids = self._ids(question)
        if ids:
            try:
                body = {"prompt": ids, "max_tokens": question.max_new_tokens, **settings}
                return self._post("/completions", body, lambda said: self._answer(said, ids))
            except Unanswered:
                self._takes_ids = False
        said = [{"role": role, "content": text} for role, text in question.messages]
        named = self._length_name
        body = {"messages": said, named: question.max_new_tokens, **settings}
        try:
            return self._post("/chat/completions", body, self._answer)
        except Unanswered as error:
            if NEWER_LENGTH not in str(error) or named == NEWER_LENGTH:
                raise
            self._length_name = NEWER_LENGTH
            return self.ask(question)

    def _ids(self, question: Question) -> list[int] | None:
        """The token ids of a prompt, as vLLM's server gives them; None where it gives none."""
        if not self._takes_ids:
            return None
        said = [{"role": role, "content": text} for role, text in question.messages]
        root = self.parsed.url.removesuffix("/v1")
        body: Row = {"messages": said, "add_generation_prompt": True}
        try:
            ids: list[int] = self._post(f"{root}/tokenize", body, lambda told: told["tokens"], 2)
        except AttackPlaneError:
            ids = []
        self._takes_ids = bool(ids) and all(isinstance(token, int) for token in ids)
        return ids if self._takes_ids else None

    def _answer(self, said: Row, ids: list[int] | None = None) -> Answer:
        """Of an answer in OpenAI's protocol."""
        choice, usage = said["choices"][0], said.get("usage") or {}
        text = choice["message"]["content"] if ids is None else choice["text"]
        counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
        prices = self.parsed.price_in, self.parsed.price_out
        cost = sum(p * (n or 0) for p, n in zip(prices, counts, strict=True)) / 1e6
        if not isinstance(text or "", str):
            raise TypeError(f"the reply is a {type(text).__name__}, no text")
        return Answer(
            (text or "").strip(),
            choice.get("finish_reason"),
            *counts,
            said.get("model"),
            ids,
            cost if any(prices) else None,
        )

    def _post(self, path: str, body: Row, read: Callable[[Any], T], tries: int | None = None) -> T:
        """What ``read`` makes of the answer, after as many tries as it takes."""
        client = self._client  # which says how to install what is missing
        import openai

        fault: object = None
        pause = 0.0
        for attempt in range(tries or self.parsed.tries):
            if self._stopped.wait(min(pause, LONGEST_PAUSE)):
                break
            pause = PAUSE * 2**attempt
            self._wait_for_turn()
            try:
                whole = {"model": self.parsed.model, **body}
                said: Any = client.post(path, body=whole, cast_to=object)
                return read(json.loads(said) if isinstance(said, str) else said)
            except openai.APIStatusError as error:
                fault = f"HTTP {error.status_code}: {error.response.text[:200]}"
                if error.status_code < 500 and error.status_code not in BUSY:
                    raise self._unanswered(fault, error.status_code) from error
                pause = max(pause, _seconds(error.response.headers.get("retry-after")))
            except openai.APIError as error:
                fault = f"{type(error).__name__}: {error.__cause__ or error}"
            except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
                fault = f"not an answer of OpenAI's protocol ({type(error).__name__}: {error})"
        raise AttackPlaneError(
            "the server gave no reply", where=self.spec, got=fault, remedy=REMEDY
        )

    def _unanswered(self, fault: str, code: int) -> Unanswered:
        error = Unanswered("the server refused", where=self.spec, got=fault, remedy=REMEDY)
        error.code = code
        return error

    def _wait_for_turn(self) -> None:
        """Keep to ``per_minute``."""
        if not self.parsed.per_minute:
            return
        with self._turns:
            turn = max(self._next_turn, time.monotonic())
            self._next_turn = turn + 60 / self.parsed.per_minute
        self._stopped.wait(turn - time.monotonic())


REMEDY = "check address, model name and OPENAI_API_KEY; the same command goes on from here"


def _seconds(header: str | None) -> float:
    """Of a Retry-After header; 0 where it says none, or a date."""
    try:
        seconds = float(header or 0)
    except ValueError:
        return 0.0
    return seconds if seconds > 0 else 0.0
