"""The judge and the remote reward against a real HTTP server on loopback, in all its moods."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Server, chat_reply

from grpo_dist.config.schema import RewardConfig, ScoringConfig
from grpo_dist.rewards.judge import prompt_text
from grpo_dist.rewards.pool.pool import ScorerPool
from grpo_dist.rewards.registry import resolve
from grpo_dist.rewards.scores import Item, Scores

ONE = ScoringConfig(num_workers=1)
TEMPLATE = "{prompt}|{completion}|{level}"


def verdict(request: Any) -> dict[str, Any]:
    """Score a completion by its first digit, or say something useless."""
    completion = request["messages"][0]["content"].split("|")[1]
    return chat_reply(f"Score: 10\nno, Score: {completion[0]}" if completion[0].isdigit() else "I will not judge that.")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("grpo_dist.rewards.http._FIRST_WAIT_SECONDS", 0.01)
    with Server(verdict) as running:
        yield running


def judged(server: Server, *completions: str, **args: Any) -> Scores:
    config = RewardConfig("judge", args={"url": f"{server.url}/v1/", "model": "m", "template": TEMPLATE, **args})
    with ScorerPool([config], ONE) as pool:
        return pool.score([Item("2+2?", text, [1], {"level": "{prompt}"}) for text in completions])


def test_scores_are_read_and_failures_stay_unscored(server: Server) -> None:
    scores = judged(server, "7 of {level}", "what?", "0", usd_per_million_input_tokens=10)
    assert scores.values[[0, 2], 0].tolist() == [0.7, 0.0]
    ((place, message),) = [(failure.item, failure.message) for failure in scores.failures]
    assert place == 1 and "has no score: 'I will not judge that.'" in message
    sent = [request["messages"][0]["content"] for request in server.requests]
    assert "2+2?|7 of {level}|{prompt}" in sent, "what is filled in is not filled in again"
    assert server.requests[0]["model"] == "m" and server.requests[0]["temperature"] == 0
    total, count = scores.metrics["judge/cost_usd"]
    assert total / count == pytest.approx(2 * 100 * 10e-6 / 3)
    assert scores.metrics["judge/latency_seconds"][0] > 0
    assert scores.extras["judge/verdict"][1] is None


@pytest.mark.parametrize("fault", ["500", "429", "503", "cut", "json", "empty", "hang"])
def test_what_may_pass_is_tried_again(server: Server, fault: str) -> None:
    server.faults = [fault]
    scores = judged(server, "5", request_seconds=0.5)
    assert scores.failures == [] and scores.values[0, 0] == 0.5
    assert scores.metrics["judge/retries"][0] == 1 and len(server.requests) == 2


@pytest.mark.parametrize(
    ("fault", "message", "attempts"), [("500", "status 500", 3), ("cut", "attempts", 3), ("401", "status 401", 1)]
)
def test_what_does_not_pass_is_a_failure_and_no_reward(server: Server, fault: str, message: str, attempts: int) -> None:
    server.always = fault
    scores = judged(server, "5", retries=2)
    assert scores.failed.all() and message in scores.failures[0].message
    assert scores.failures[0].kind == "raised" and len(server.requests) == attempts


def test_nobody_listens(server: Server) -> None:
    server.url = "http://127.0.0.1:9"
    scores = judged(server, "5", retries=1)
    assert scores.failed.all() and "2 attempts" in scores.failures[0].message


def test_concurrency_is_bounded(server: Server) -> None:
    server.always = "slow"
    scores = judged(server, *[f"{n % 10} {n}" for n in range(24)], concurrency=4)
    assert scores.failures == [] and 2 <= server.most_at_once <= 4


def test_the_cache_outlives_the_pool(server: Server, tmp_path: Path) -> None:
    for cached in (0.0, 1.0):
        scores = judged(server, "5", "6", cache=str(tmp_path))
        assert scores.values[:, 0].tolist() == [0.5, 0.6]
        total, count = scores.metrics["judge/cached"]
        assert total / count == cached
    assert len(server.requests) == 2
    next(tmp_path.glob("*/*.json")).write_text("broken")
    assert judged(server, "5", "6", cache=str(tmp_path)).failures == [] and len(server.requests) == 3
    judged(server, "5", cache=str(tmp_path), request={"temperature": 1.0})
    assert len(server.requests) == 4, "another question is another verdict"


def test_the_key_is_sent_and_never_shown(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    server.always = "401"
    args = {"url": server.url, "model": "m", "template": TEMPLATE, "auth_variable": "JUDGE_KEY"}
    with pytest.raises(ValueError, match=r"list it under the reward's `environment: \[JUDGE_KEY\]`"):
        ScorerPool([RewardConfig("judge", args=args)], ONE)
    with ScorerPool([RewardConfig("judge", args=args, environment=["JUDGE_KEY"])], ONE) as pool:
        scores = pool.score([Item("?", "5", [1], {"level": 1})])
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"
    assert "sk-secret" not in str(scores)
    monkeypatch.setenv("JUDGE_KEY", "sk-secret\n")  # the client's own message would have it
    with pytest.raises(ValueError, match="JUDGE_KEY has a line break") as caught:
        ScorerPool([RewardConfig("judge", args=args, environment=["JUDGE_KEY"])], ONE)
    assert "sk-secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"template": "{prompt}"}, "has no {completion}"),
        ({"score_pattern": "Score"}, "one group"),
        ({"min_score": 3, "max_score": 3}, "expected a range"),
        ({"url": "localhost"}, "starts with http"),
        ({"concurrency": 0}, "concurrency 0"),
        ({"api_key": "sk-secret"}, "unexpected keyword argument 'api_key'"),
    ],
)
def test_mistakes_are_said_at_once(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="judge") as caught:
        resolve(RewardConfig("judge", args={"url": "http://x", "model": "m", **args}))
    assert message in str(caught.value) and "sk-secret" not in str(caught.value)


def test_a_column_of_the_template_is_required() -> None:
    reward = resolve(RewardConfig("judge", args={"url": "http://x", "model": "m", "template": TEMPLATE}))
    with pytest.raises(ValueError, match=r"needs the argument.*level"):
        reward.parameters.check_columns("judge", ["answer"])


def test_prompts_as_text() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert [prompt_text("a"), prompt_text(messages[1:])] == ["a", "Hi"]
    assert prompt_text(messages) == "system: Be brief.\n\nuser: Hi"


def test_a_remote_reward(server: Server) -> None:
    def answer(request: Any) -> Any:
        assert sorted(request) == ["answer", "completions", "prompts"]
        values = {"bad": {"error": "cannot"}, "none": None, "nan": "x"}
        return {"rewards": [values.get(text, 0.5) for text in request["completions"]]}

    server.answer = answer
    server.faults = ["503", "json"]
    with ScorerPool([RewardConfig("remote", args={"url": server.url})], ONE) as pool:
        scores = pool.score([Item("?", text, [1], {"answer": "a"}) for text in ("a", "bad", "none", "nan")])
    assert scores.values[0, 0] == 0.5
    assert [(failure.item, failure.kind) for failure in scores.failures] == [(1, "raised"), (3, "bad_value")]
    assert not scores.failed[2, 0] and len(server.requests) == 3
    server.answer = lambda request: {"rewards": []}
    with ScorerPool([RewardConfig("remote", args={"url": server.url, "retries": 1})], ONE) as pool:
        scores = pool.score([Item("?", "a", [1]), Item("?", "b", [1])])
    assert scores.failed.all() and "has to be a list of 2 entries" in scores.failures[0].message
    assert len(server.requests) == 5, "one request for both, tried twice"
