"""The client of the judge: what goes wrong at endpoints, how much is in flight, and where the key
goes."""

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from judge_server import JudgeServer
from small_runs import picture

from uno_ds.evaluation.answers import FAILURES_IN_A_ROW, KeptAnswers, ask_all
from uno_ds.evaluation.benchmark import Picture
from uno_ds.evaluation.judge import Judge, Question, Reply, Unanswered, check_fields
from uno_ds.settings import SettingsError

ROOT = Path(__file__).parents[2]
KEY = "sk-very-secret-4711"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("uno_ds.evaluation.judge.FIRST_PAUSE", 0.01)


def yes(reply: Reply) -> bool:
    if reply.text not in ("yes", "no"):
        raise ValueError("neither yes nor no")
    return reply.text == "yes"


def question(key: str = "a", text: str = "is it?", **more) -> Question:
    return Question(key, (text,), yes, **more)


def judge(server: JudgeServer, **more) -> Judge:
    return Judge(server.url, "m", **{"timeout": 20.0, "retries": 2, "environment": {}, **more})


def always(text):
    return lambda *_: text


FAULTS = {
    "429": "rate_limit",
    "500": "server_error",
    "broken": "broken_answer",
    "refusal": "refused",
    "empty": "refused",
    "slow": "timeout",
}


@pytest.mark.parametrize("fault, cause", FAULTS.items())
def test_a_fault_is_asked_again_and_then_has_its_cause(fault, cause):
    limit = 0.4 if fault == "slow" else 20.0
    with JudgeServer(always("yes"), lambda number: fault if number == 1 else None) as server:
        assert judge(server, timeout=limit).ask(question())[1] is True
        assert len(server.seen) == 2
    with JudgeServer(always("yes"), always(fault)) as server:
        with pytest.raises(Unanswered) as caught:
            judge(server, timeout=limit, retries=1).ask(question())
        assert caught.value.cause == cause and len(server.seen) == 2


def test_an_answer_that_cannot_be_read_is_asked_again_and_never_a_zero(tmp_path):
    with JudgeServer(lambda text, _: "maybe" if "odd" in text else "no") as server:
        answers = KeptAnswers(tmp_path, "m")
        questions = [question("a"), question("b", "an odd one")]
        outcome = ask_all(judge(server), questions, answers, 2)
        assert outcome.values == {"a": False} and outcome.failed == {"b": "unparsable"}
        assert outcome.causes == {"unparsable": 1} and len(server.seen) == 1 + 3
        answers.close()
        # What the judge wrote can be looked at, once for each call.
        rows = [json.loads(line) for line in answers.path.read_text().splitlines()]
        failed = {"failed": "unparsable", "message": "neither yes nor no: maybe", "answer": "maybe"}
        assert {row["key"]: "text" in row for row in rows} == {"a": True, "b": False}
        assert failed.items() <= next(row for row in rows if row["key"] == "b").items()
        # What failed is asked again by the next call, what was answered is not.
        outcome = ask_all(judge(server), questions, KeptAnswers(tmp_path, "m"), 2)
        assert (outcome.kept, outcome.asked) == (1, 1)
        assert outcome.values == {"a": False} and outcome.failed == {"b": "unparsable"}


def test_missing_logprobs_are_a_cause_of_their_own():
    def rule(*_):
        return {"yes": -0.1}

    with JudgeServer(rule) as server:
        reply, _ = judge(server).ask(question(logprobs=True, max_tokens=1))
        assert reply.tokens == {"yes": pytest.approx(0.9048374)}
        body = server.seen[0]
        assert (body["logprobs"], body["top_logprobs"], body["max_tokens"]) == (True, 20, 1)
    with JudgeServer(rule, always("no_logprobs")) as server:
        with pytest.raises(Unanswered) as caught:
            judge(server).ask(question(logprobs=True))
        assert caught.value.cause == "no_logprobs"


def test_an_endpoint_that_refuses_the_key_ends_the_call_at_once_without_showing_it(tmp_path):
    with JudgeServer(always("yes"), always("401")) as server:
        asked = judge(server, environment={"OPENAI_API_KEY": KEY})
        with pytest.raises(
            SettingsError, match=r"--judge: 127.0.0.1:\d+ refuses the key"
        ) as caught:
            ask_all(asked, [question(str(n)) for n in range(50)], KeptAnswers(tmp_path, "m"), 4)
        assert server.keys[0] == f"Bearer {KEY}" and len(server.seen) <= 8
    assert KEY not in str(caught.value) and "***" in str(caught.value)
    assert KEY not in json.dumps(asked.description())


def test_a_key_that_no_header_can_hold_is_refused_without_being_shown():
    for bad in ("sk-one\nX-Other: two", "sk-\u00e9"):
        with pytest.raises(SettingsError, match="^OPENAI_API_KEY: the environment") as caught:
            Judge("http://localhost:9/v1", "m", environment={"OPENAI_API_KEY": bad})
        assert "sk-" not in str(caught.value)
    with JudgeServer(always("yes")) as server:
        judge(server, environment={"OPENAI_API_KEY": f" {KEY}\n"}).ask(question())
        assert server.keys == [f"Bearer {KEY}"]


def test_a_redirect_does_not_carry_the_key_away():
    with JudgeServer(always("yes"), always("redirect")) as server:
        with pytest.raises(SettingsError, match="redirects, which is not followed"):
            judge(server, environment={"UNO_DS_JUDGE_KEY": KEY}).ask(question())
        assert len(server.seen) == 1


def test_an_endpoint_that_answers_nothing_ends_the_call(tmp_path):
    with JudgeServer(always("yes"), always("400")) as server:
        with pytest.raises(SettingsError, match="no usable answer to .* in a row .*rejected"):
            ask_all(
                judge(server),
                (question(str(number)) for number in range(10_000)),
                KeptAnswers(tmp_path, "m"),
                4,
            )
        # A rejected request is not repeated.
        assert len(server.seen) <= FAILURES_IN_A_ROW + 8


def test_an_endpoint_that_is_not_there_is_unreachable():
    with pytest.raises(Unanswered) as caught:
        Judge("http://127.0.0.1:9/v1", "m", retries=0, environment={}).ask(question())
    assert caught.value.cause == "unreachable"


def test_as_many_questions_as_asked_for_are_in_flight(tmp_path):
    with JudgeServer(always("yes")) as server:
        # Long enough for a slow machine to send the others meanwhile.
        server.delay = 0.4
        questions = (question(str(number)) for number in range(40))
        outcome = ask_all(judge(server), questions, KeptAnswers(tmp_path, "m"), 8)
        assert len(outcome.values) == 40 and 4 <= server.most_at_once <= 8


@pytest.mark.slow
def test_a_thousand_images_use_bounded_memory(tmp_path):
    """The peak follows the 16 calls in flight, not the 1,000 images."""
    path = tmp_path / "image.png"
    picture(900, 900).save(path)
    size = path.stat().st_size
    assert size > 200_000
    with JudgeServer(always("yes")) as server:
        server.seen = _Counter()  # the bodies would fill the memory of this process
        asked = Judge(server.url, "m", environment={})
        paths = [tmp_path / f"{number}.png" for number in range(1000)]
        for own in paths:
            own.hardlink_to(path)
        questions = (Question(own.name, (Picture(own),), yes) for own in paths)
        tracemalloc.start()
        try:
            outcome = ask_all(asked, questions, KeptAnswers(tmp_path, "m"), 16)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert len(outcome.values) == 1000
    # Client and server hold each image in flight a few times over, as bytes, base64 and JSON.
    assert peak < 16 * 12 * size < 1000 * size


class _Counter(list):
    def append(self, item: object) -> None:
        super().append(None)


def test_another_image_or_question_is_asked_anew(tmp_path):
    image = tmp_path / "image.png"
    picture().save(image)
    with JudgeServer(always("yes")) as server:

        def asked(text: str = "is it?") -> int:
            answers = KeptAnswers(tmp_path, "m")
            outcome = ask_all(
                judge(server), [Question("a", (Picture(image), text), yes)], answers, 1
            )
            answers.close()
            return outcome.asked

        assert [asked(), asked(), asked("is it not?")] == [1, 0, 1]
        picture(seed=5).save(image)
        assert [asked(), asked()] == [1, 0]


SCRIPT = """
import sys
from pathlib import Path
from uno_ds.evaluation.answers import KeptAnswers, ask_all
from uno_ds.evaluation.judge import Judge, Question
questions = (Question(str(number), ("is it?",), lambda reply: reply.text) for number in range(400))
ask_all(Judge(sys.argv[1], "m", environment={}), questions, KeptAnswers(Path(sys.argv[2]), "m"), 4)
"""


def test_a_kill_loses_the_answers_in_flight_alone(tmp_path):
    with JudgeServer(always("yes")) as server:
        server.delay = 0.02
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        words = [sys.executable, "-c", SCRIPT, server.url, str(tmp_path)]
        process = subprocess.Popen(words, env=environment)
        deadline = time.monotonic() + 100
        while len(server.seen) < 100 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.2)
        answered = len(server.seen)
        path = tmp_path / "answers/m.jsonl"
        with path.open("ab") as stream:
            stream.write(b'{"key": "399", "requ')  # as a kill in the middle of a line leaves it
        answers = KeptAnswers(tmp_path, "m")
        questions = (question(str(number)) for number in range(400))
        outcome = ask_all(judge(server), questions, answers, 4)
        answers.close()
        assert 100 <= answered < 400 and answered - 4 <= outcome.kept <= answered
        assert len(outcome.values) == 400
    again = KeptAnswers(tmp_path, "m")
    assert len(again._replies) == 400


def test_fields_of_a_request_can_be_added_and_removed():
    with JudgeServer(always("yes")) as server:
        fields = check_fields(
            '{"temperature": null, "max_completion_tokens": 9, "max_tokens": null}'
        )
        judge(server, fields=fields).ask(question())
        assert set(server.seen[0]) == {"model", "messages", "max_completion_tokens"}
    for text in ("{", "[]", '{"api_key": "x"}'):
        with pytest.raises(SettingsError, match="--judge-options"):
            check_fields(text)


def test_a_key_that_goes_over_a_network_unencrypted_is_known():
    with_key = {"OPENAI_API_KEY": KEY}
    urls = ("http://judges.example/v1", "https://judges.example/v1", "http://localhost:8000/v1")
    shown = [Judge(url, "m", environment=with_key).shows_key for url in urls]
    assert shown == [True, False, False] and not Judge(urls[0], "m", environment={}).shows_key
    whole = Judge("http://localhost:8000/v1/chat/completions/", "m", environment={})
    assert whole.url == "http://localhost:8000/v1/chat/completions"


def test_a_server_on_this_machine_is_reached_without_a_proxy(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with JudgeServer(always("yes")) as server:
        assert judge(server).ask(question())[1] is True
