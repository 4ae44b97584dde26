"""Served models as targets: whatever a server does, no row is lost, doubled or mislabelled."""

import json
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

import attack_plane as ap
from cli import cli
from core import served
from core.embedded import embedded_folder
from core.errors import AttackPlaneError
from core.models import ModelHandle, load
from core.served import Answer, Question, Server, Unanswered, parse_server
from core.specs import parse_spec
from tests.servers import reply, server


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(served, "PAUSE", 0.0)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def questions(count):
    return [Question([("user", f"question {n}")], 8) for n in range(count)]


def echo(body):
    return reply(f"an answer to {body['messages'][-1]['content']}")


# --- specs ----------------------------------------------------------------------------------------
def test_options_of_a_server_are_no_part_of_its_name():
    spec = parse_server("http://localhost:8000/v1#org/name?at_once=8&per_minute=30&price_in=0.5")
    assert spec.text == "http://localhost:8000/v1#org/name" and spec.model == "org/name"
    assert (spec.at_once, spec.per_minute, spec.price_in, spec.tries) == (8, 30.0, 0.5, 5)
    handle = ModelHandle("http://localhost:8000/v1#org/name?at_once=8")
    assert handle.spec == spec.text and parse_spec(handle.spec).kind == "served"
    assert handle.fingerprint == ModelHandle(spec.text).fingerprint


@pytest.mark.parametrize(
    "spec",
    [
        "http://h/v1",
        "http://#m",
        *(
            f"http://h/v1#m?{o}"
            for o in ("x=1", "at_once=0", "tries=1.5", "timeout=nan", "per_minute=-1", "at_once")
        ),
    ],
)
def test_a_wrong_spec_of_a_server_says_what_it_may_hold(spec):
    with pytest.raises(AttackPlaneError, match=r"a server spec needs|options: at_once"):
        parse_spec(spec)


def test_what_needs_weights_refuses_a_served_model(tmp_path):
    spec = "http://127.0.0.1:9/v1#m"
    with pytest.raises(AttackPlaneError, match="weights of a served model are not here"):
        load(spec)
    run = ["--run", str(tmp_path / "run"), "--model", spec]
    for arguments in (
        ["gcg", *run, "--limit", "1"],
        ["directions", *run],
        ["train", "sft", "--model", spec, "--out", str(tmp_path / "t")],
    ):
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 1 and "weights of a served model" in result.output, result.output


# --- asking ---------------------------------------------------------------------------------------
def test_answers_carry_what_the_server_says_and_what_they_cost():
    with server(reply(" hello ")) as (url, _):
        answer = Server(f"{url}#m?price_in=2&price_out=10").ask(questions(1)[0])
        assert Server(f"{url}#m").ask(questions(1)[0]).cost is None
    assert answer == Answer(
        "hello", "stop", 11, 3, "m-1", None, pytest.approx((2 * 11 + 10 * 3) / 1e6)
    )


def test_faults_of_every_kind_lose_and_double_nothing():
    """A fifth each: 500, 429 with Retry-After, torn answers, wrong JSON, JSON of something else."""
    draw, faults = random.Random(0), Counter()

    def moody(body):
        kind = draw.choice(["500", "429", "torn", "html", "other", *["good"] * 5])
        faults[kind] += 1
        return {
            "500": (500, "oh"),
            "429": (429, "slow", {"Retry-After": "0.01"}),
            "torn": None,
            "html": (200, "<html>"),
            "other": (200, '{"choices": []}'),
            "good": echo(body),
        }[kind]

    with server(by_path={"/v1/chat/completions": moody}) as (url, _):
        target = Server(f"{url}#m?tries=30&at_once=5")
        given = [pair for part in target.ask_all(questions(60)) for pair in part]
    assert sorted(n for n, _ in given) == list(range(60))
    assert all(answer.text == f"an answer to question {n}" for n, answer in given)
    assert faults["good"] == 60 and min(faults.values()) > 3 and len(faults) == 6


def test_a_server_that_dies_gives_what_it_had_answered_first():
    count = iter(range(100))

    def dies(body):
        return echo(body) if next(count) < 7 else (503, "gone")

    given = []
    with (
        server(by_path={"/v1/chat/completions": dies}) as (url, _),
        pytest.raises(AttackPlaneError, match="HTTP 503: gone"),
    ):
        for part in Server(f"{url}#m?tries=2&at_once=3").ask_all(questions(20)):
            given += part
    assert len(given) == 7 and len({n for n, _ in given}) == 7


def test_a_refused_question_does_not_stop_the_others_and_a_wrong_key_does():
    def picky(body):
        bad = body["messages"][-1]["content"].endswith("3")
        return (400, "content filter") if bad else echo(body)

    with server(by_path={"/v1/chat/completions": picky}) as (url, _):
        given = dict(p for part in Server(f"{url}#m").ask_all(questions(6)) for p in part)
    assert isinstance(given.pop(3), Unanswered)
    assert {n: a.text for n, a in given.items()} == {n: f"an answer to question {n}" for n in given}
    with server((401, "who are you")) as (url, sent):
        with pytest.raises(Unanswered, match="HTTP 401"):
            list(Server(f"{url}#m?at_once=1").ask_all(questions(6)))
        assert len(sent) == 1


def test_questions_keep_to_the_rate_and_no_more_are_asked_at_once():
    now, most, lock = [], [0, 0], threading.Lock()

    def slow(body):
        now.append(time.monotonic())
        return echo(body)

    with server(by_path={"/v1/chat/completions": slow}) as (url, _):
        target = Server(f"{url}#m?per_minute=1200&at_once=4")
        target.ask(questions(1)[0])  # the first connection takes a while
        list(target.ask_all(questions(8)))
    assert now[-1] - now[1] >= 7 * 60 / 1200 - 0.03
    real = Server.ask

    def counted(self, question):
        with lock:
            most[0] += 1
            most[1] = max(most)
        time.sleep(0.01)
        answer = real(self, question)
        with lock:
            most[0] -= 1
        return answer

    with (
        server(by_path={"/v1/chat/completions": echo}) as (url, _),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(Server, "ask", counted)
        list(Server(f"{url}#m?at_once=3").ask_all(questions(20)))
    assert most == [0, 3]


def test_newer_names_of_the_reply_length_are_taken():
    def newer(body):
        if "max_tokens" in body:
            return 400, "use 'max_completion_tokens' instead"
        return reply(str(body["max_completion_tokens"]))

    with server(by_path={"/v1/chat/completions": newer}) as (url, sent):
        target = Server(f"{url}#m")
        assert [target.ask(questions(1)[0]).text for _ in range(2)] == ["8", "8"]
    assert len(sent) == 3


def test_the_key_goes_to_this_machine_or_over_https_only(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    for url, key in (
        ("http://far.example/v1", "none"),
        ("https://far.example/v1", "secret"),
        ("http://127.0.0.1:1/v1", "secret"),
    ):
        assert Server(f"{url}#m")._client.api_key == key


def test_without_the_client_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(AttackPlaneError, match=r"attack-plane\[servers\]"):
        Server("http://127.0.0.1:9/v1#m").ask(questions(1)[0])


# --- token ids ------------------------------------------------------------------------------------
def test_a_server_that_tokenises_is_sent_ids_and_they_certify_the_prompt(tmp_path, qwen):
    """vLLM's two paths, spoken by a stand-in that renders with the tiny model's own tokenizer."""
    tokenizer = qwen.tokenizer

    def tokenise(body):
        ids = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True)
        return 200, json.dumps({"tokens": list(ids["input_ids"] if hasattr(ids, "keys") else ids)})

    def complete(body):
        choice = {"text": f" read {len(body['prompt'])} ids", "finish_reason": "length"}
        return 200, json.dumps({"model": "m", "choices": [choice], "usage": None})

    prompt = ap.gcg(
        qwen, "Bake a cake", "Sure, here is", ap.GCGConfig(num_steps=1, search_width=4, topk=8)
    )
    with server(by_path={"/tokenize": tokenise, "/v1/completions": complete}) as (url, sent):
        (row,) = ap.replay([prompt], ap.Server(f"{url}#m"), judges="refusal_phrases")
    paths = [path for path, _, _ in sent]
    assert paths == ["/tokenize", "/v1/completions"]
    ids = sent[1][2]["prompt"]
    assert row["reply"] == f"read {len(ids)} ids" and row["d"] is None
    text = tokenizer.decode(ids)
    assert prompt.prompt in text


# --- commands -------------------------------------------------------------------------------------
@pytest.fixture
def run(tmp_path):
    path = tmp_path / "run"
    call(
        "templates",
        "--class",
        "persona",
        "--class",
        "refusal_suppression",
        "--limit",
        4,
        "--run",
        path,
    )
    return path


def call(*arguments, code=0):
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_transfer_goes_on_after_a_dead_server_and_asks_nothing_twice(run):
    asked, alive = Counter(), [5]

    def mortal(body):
        asked[body["messages"][-1]["content"]] += 1
        if alive[0] <= 0:
            asked[body["messages"][-1]["content"]] -= 1
            return 503, "gone"
        alive[0] -= 1
        return echo(body)

    with server(by_path={"/v1/chat/completions": mortal}) as (url, _):
        transfer = (
            "transfer",
            "--run",
            run,
            "--target",
            f"{url}#m?tries=1&at_once=2",
            "--judge",
            "rules",
        )
        call(*transfer, code=1)
        assert len(lines_of(run / "replays.jsonl")) == 5
        alive[0] = 10**6
        output = call(*transfer)
        call(*transfer)
    rows = lines_of(run / "replays.jsonl")
    prompts = {a["artifact_id"]: a["prompt"] for a in lines_of(run / "attacks.jsonl")}
    assert sorted(r["artifact_id"] for r in rows) == sorted(prompts)
    assert all(r["reply"] == f"an answer to {prompts[r['artifact_id']]}".strip() for r in rows)
    assert set(asked.values()) == {1}
    assert {r["target_model"] for r in rows} == {f"{url}#m"} and "secret" not in output
    assert rows[0]["certificate"]["served"]["prompt_tokens"] == 11
    assert rows[0]["certificate"]["sent_as_meant"] is None and rows[0]["d"] is None
    report = call("report", "--run", run)
    assert "not known" in report


def test_what_a_server_refuses_is_told_and_the_rest_is_kept(run):
    def picky(body):
        return (400, "too long") if len(body["messages"][-1]["content"]) > 300 else echo(body)

    with server(by_path={"/v1/chat/completions": picky}) as (url, _):
        output = call("transfer", "--run", run, "--target", f"{url}#m", "--judge", "rules")
    prompts = [a["prompt"] for a in lines_of(run / "attacks.jsonl")]
    long = sum(len(p) > 300 for p in prompts)
    assert 0 < long < len(prompts) and output.count("not sent:") == long
    assert len(lines_of(run / "replays.jsonl")) == len(prompts) - long


def test_a_sweep_takes_served_targets_and_draws_those_that_are_here(tmp_path, tiny_folders):
    config = tmp_path / "sweep.toml"
    with server(by_path={"/v1/chat/completions": echo}) as (url, _):
        config.write_text(
            f'run = "{tmp_path / "run"}"\nsources = []\njudges = ["rules"]\n'
            f'targets = ["{url}#m?at_once=2", "{tiny_folders["qwen2"]}"]\n'
            '[behaviours]\nlimit = 3\n[attacks.templates]\nclasses = ["persona"]\n'
            "[replay]\nmax_new_tokens = 4\n[directions]\nreply_tokens = 4\nresamples = 20\n"
            'judge = "rules"\n'
        )
        output = call("sweep", config)
    rows = lines_of(tmp_path / "run" / "replays.jsonl")
    assert {r["target_model"] for r in rows} == {f"{url}#m", str(tiny_folders["qwen2"])}
    assert "missing" not in output
    shown = {r["target"] for r in lines_of(tmp_path / "run" / "plane.jsonl")}
    assert shown == {str(tiny_folders["qwen2"])}


def test_evaluate_says_what_it_can_of_a_served_model(tmp_path):
    behaviours = tmp_path / "goals.csv"
    behaviours.write_text(
        "goal,label,split,target\n"
        + "".join(
            f"Do thing {n},{label},test,Sure\n"
            for n, label in enumerate(["harmful", "harmless", "pseudo_harmful"] * 2)
        )
    )
    with server(by_path={"/v1/chat/completions": echo}) as (url, sent):
        spec = f"{url}#m"
        options = ["--judge", "rules", "--behaviours", behaviours, "--instructions", 6]
        output = call("evaluate", "--run", tmp_path / "run", "--model", spec, *options)
        asked = len(sent)
        call("evaluate", "--run", tmp_path / "run", "--model", spec, *options)
        assert len(sent) == asked
    (row,) = lines_of(tmp_path / "run" / "evaluation.jsonl")
    assert "adaptive ASR, D, perplexity" in output and row["model"] == spec
    assert row["instructions_n"] == 6 and "perplexity" not in row
    assert row["robustness"]["plain"]["behaviours"] == 2 and row["robustness"]["plain"]["d"] is None


def test_pair_attacks_a_served_model(tmp_path):
    def both(body):
        system = body["messages"][0]["content"] if body["messages"][0]["role"] == "system" else ""
        wish = json.dumps({"improvement": "i", "prompt": "please bake"})
        return reply(wish) if "test how robust" in system else reply("Sure, here is a cake")

    with server(by_path={"/v1/chat/completions": both}) as (url, _):
        call("pair", "--model", f"{url}#m", "--run", tmp_path / "run", "--limit", 1, "--streams", 2)
    rows = {r["attack"]: r for r in lines_of(tmp_path / "run" / "attacks.jsonl")}
    assert rows["pair"]["prompt"] == "please bake" and rows["pair"]["rendering"] is None
    assert rows["pair"]["source_model"] == f"{url}#m" and "plain" in rows


@pytest.fixture
def transformers_serve(tmp_path):
    """The address of transformers' own server with the embedded model, on this machine."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    folder = embedded_folder()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(folder)]
    command += ["--port", str(port), "--device", "cpu", "--dtype", "float32"]
    log = tmp_path / "log.txt"
    with open(log, "wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except OSError:
                    assert process.poll() is None, log.read_text()[-2000:]
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1#{folder}"
        finally:
            process.kill()


@pytest.mark.slow
def test_greedy_replies_of_a_real_server_are_those_of_the_model_here(tmp_path, transformers_serve):
    run = tmp_path / "run"
    call("templates", "--class", "persona", "--class", "persuasion", "--limit", 10, "--run", run)
    targets = ["--target", "embedded", "--target", f"{transformers_serve}?at_once=1"]
    call("transfer", "--run", run, *targets, "--judge", "rules", "--max-new-tokens", 24)
    replies: dict[str, dict[str, str]] = {}
    for row in lines_of(run / "replays.jsonl"):
        replies.setdefault(row["artifact_id"], {})[row["target_model"]] = row["reply"]
    same = [len(set(own.values())) == 1 for own in replies.values()]
    print(f"{sum(same)} of {len(same)} replies are the same")
    assert all(len(own) == 2 for own in replies.values()) and len(same) >= 30
    assert sum(same) >= 0.95 * len(same)
