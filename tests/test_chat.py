"""Chat models: a local one, and a server that speaks OpenAI's protocol, with its faults."""

import json

import pytest

from core import served
from core.chat import LocalChat, ServerChat, open_chat
from core.errors import AttackPlaneError
from core.models import handle_of
from core.served import Server
from tests.servers import server


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(served, "PAUSE", 0.0)


def chat_of(spec):
    return ServerChat(Server(spec))


GOOD = (200, json.dumps({"choices": [{"message": {"content": " hello "}}]}))


def test_a_server_is_asked_in_openais_protocol(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with server(GOOD) as (url, sent):
        chat = open_chat(f"{url}#tiny")
        said = chat.replies(
            [[("system", "s"), ("user", "u")]] * 2, max_new_tokens=7, temperature=1.0, seed=3
        )
    assert said == ["hello", "hello"] and isinstance(chat, ServerChat)
    # two are asked at once: whichever came first
    path, headers, body = min(sent, key=lambda request: request[2]["seed"])
    assert sorted(request[2]["seed"] for request in sent) == [3, 4]
    assert (
        path == "/v1/chat/completions"
        and {k.lower(): v for k, v in headers.items()}["authorization"] == "Bearer secret"
    )
    assert body["messages"] == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
    ]
    assert (body["model"], body["max_tokens"], body["temperature"], body["seed"]) == (
        "tiny",
        7,
        1.0,
        3,
    )


def test_a_busy_server_is_asked_again_and_a_refusing_one_is_not():
    with server((500, "busy"), (429, "slow"), GOOD) as (url, sent):
        assert chat_of(f"{url}#m").replies([[("user", "u")]], max_new_tokens=1) == ["hello"]
        assert len(sent) == 3
    with server((404, "no such model")) as (url, sent):
        with pytest.raises(AttackPlaneError, match="HTTP 404: no such model"):
            chat_of(f"{url}#m").replies([[("user", "u")]], max_new_tokens=1)
        assert len(sent) == 1


@pytest.mark.parametrize("body", ["not json", "{}", '{"choices": []}'])
def test_an_answer_of_another_protocol_is_an_error_with_the_server_in_it(body):
    with (
        server((200, body)) as (url, _),
        pytest.raises(AttackPlaneError, match="protocol") as error,
    ):
        chat_of(f"{url}#m").replies([[("user", "u")]], max_new_tokens=1)
    assert url in str(error.value)


def test_a_server_that_is_not_there_and_a_spec_without_a_model_are_errors():
    with pytest.raises(AttackPlaneError, match="gave no reply"):
        chat_of("http://127.0.0.1:9/v1#m?timeout=1").replies([[("user", "u")]], max_new_tokens=1)
    with pytest.raises(AttackPlaneError, match="model's name"):
        open_chat("http://127.0.0.1:9/v1")


def test_a_local_model_replies_after_the_opening_and_is_not_loaded_twice(qwen):
    chat = open_chat(qwen.spec, [handle_of(qwen)])
    assert isinstance(chat, LocalChat) and chat.renderer.loaded is qwen
    messages = [("system", "Be brief"), ("user", "Hi"), ("assistant", "Hello"), ("user", "Tea?")]
    first = chat.replies([messages], max_new_tokens=5)
    assert first == chat.replies([messages], max_new_tokens=5)
    texts = []
    real = chat.renderer.tokenise
    chat.renderer.tokenise = lambda t: texts.extend(t) or real(t)
    chat.replies([messages], max_new_tokens=1, opening='{"a')
    assert (
        texts[0].endswith('<|im_start|>assistant\n{"a')
        and "Be brief" in texts[0]
        and "Hello" in texts[0]
    )
