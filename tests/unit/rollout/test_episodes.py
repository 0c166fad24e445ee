"""Episodes of the toy model that calls tools: rows, masks, limits and outcomes, with real processes of environments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from modules_on_disk import importable
from played_episodes import (
    ENDS,
    GAMES,
    HOSTS,
    LONGEST,
    PRODUCTS,
    SIZE,
    TOKENIZER,
    TOOLS,
    make_config,
    make_requests,
    played,
    turns_of,
)
from transformers import AutoModelForCausalLM

from grpo_dist.config.schema import RewardConfig, ScoringConfig
from grpo_dist.model import attention
from grpo_dist.model.toy import toy_path
from grpo_dist.rewards.pool.pool import ScorerPool
from grpo_dist.rewards.scores import Item
from grpo_dist.rollout import Decoder, NativeDecoder, PagedDecoder, RowDecoder, decode_all, paged_obstacle
from grpo_dist.rollout.native.kernel import KernelStep
from grpo_dist.rollout.playing import open_host
from grpo_dist.rollout.sampling import sampling_with
from grpo_dist.types import Prompt, Trajectory


@pytest.fixture(scope="module", autouse=True)
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with importable(tmp_path_factory, "played", TOOLS):
        yield
        while HOSTS:
            HOSTS.popitem()[1].close()


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    names = {"shared": attention.NAME, "plain": "sdpa"}
    path = toy_path("toy-tools")
    return {key: AutoModelForCausalLM.from_pretrained(path, dtype="float32", attn_implementation=name).eval()
            for key, name in names.items()}  # fmt: skip


@pytest.fixture(scope="module")
def products(models: dict[str, Any]) -> tuple[list[Prompt], list[Trajectory]]:
    return played(make_config(), PRODUCTS, models["shared"])


def test_a_row_is_turns_with_answers_between_them(products: tuple[list[Prompt], list[Trajectory]]) -> None:
    _, trajectories = products
    assert any(t.episode and t.episode.turns > 1 for t in trajectories)
    for each in trajectories:
        assert each.episode is not None and each.episode.failure is None and each.episode.reward is None
        runs = turns_of(each)
        assert [sampled for sampled, _ in runs] == [n % 2 == 0 for n in range(len(runs))]
        assert each.episode.turns == (len(runs) + 1) // 2 and len(each.ids) <= LONGEST
        assert len(each.logprobs) == sum(each.sampled)
        assert all(ids[-1] in ENDS for sampled, ids in runs[:-1] if sampled)
        is_answered = each.episode.messages[-1]["role"] == "assistant" and "tool_calls" not in each.episode.messages[-1]
        assert each.finished == (is_answered and each.ids[-1] in ENDS)
        told = [message["content"] for message in each.episode.messages if message["role"] == "tool"]
        between = [TOKENIZER.decode(ids) for sampled, ids in runs if not sampled]
        assert between == [f"\nResult: {text}\nAnswer:" for text in told[: len(between)]]
        said = [message["content"] for message in each.episode.messages if message["role"] == "assistant"]
        assert said == [TOKENIZER.decode(ids, skip_special_tokens=True) for sampled, ids in runs if sampled]


def test_each_turn_is_drawn_from_the_row_before_it(
    products: tuple[list[Prompt], list[Trajectory]], models: dict[str, Any]
) -> None:
    """A slow twin: one turn after another by a decoder alone, each from all ids before it."""
    prompts, trajectories = products
    decoder = RowDecoder(ENDS, LONGEST)
    for request, each in zip(make_requests(prompts), trajectories, strict=True):
        at, logprobs = 0, list(each.logprobs)
        for sampled, ids in turns_of(each):
            if sampled:
                asked = replace(request, prompt=request.prompt + each.ids[:at], offset=at, max_new_tokens=LONGEST - at)
                (turn,) = decode_all(decoder, models["plain"], [asked])
                assert turn.ids == ids
                assert turn.logprobs == pytest.approx(logprobs[: len(ids)], abs=1e-4)
                del logprobs[: len(ids)]
            at += len(ids)
        assert not logprobs, "every sampled token is of a turn"


@pytest.mark.usefixtures("kernel")
def test_every_decoder_plays_the_same(products: tuple[list[Prompt], list[Trajectory]], models: dict[str, Any]) -> None:
    decoders: list[Callable[[], tuple[Any, Decoder]]] = [
        lambda: (models["plain"], RowDecoder(ENDS, LONGEST)),
        lambda: (models["shared"], NativeDecoder(ENDS, LONGEST, 300)),
        lambda: (models["shared"], NativeDecoder(ENDS, LONGEST, 1 << 20, step_of=KernelStep, copied_prompt=0)),
    ]
    if paged_obstacle() is None:
        decoders.append(lambda: (models["shared"], PagedDecoder(ENDS, LONGEST, 1 << 14)))
    for make in decoders:
        _, others = played(make_config(), PRODUCTS[:2], *make())
        expected = products[1][: len(others)]
        assert [(t.ids, t.sampled, t.finished) for t in others] == [(t.ids, t.sampled, t.finished) for t in expected]


@pytest.mark.usefixtures("kernel")
def test_a_stop_string_ends_a_turn(models: dict[str, Any]) -> None:
    config = make_config()
    config.rollout.stop = ["</tool_call>"]
    sampling = sampling_with(config.rollout, TOKENIZER, ENDS, models["plain"].config)
    others = None
    for decoder, model in (
        (RowDecoder(ENDS, LONGEST), models["plain"]),
        (NativeDecoder(ENDS, LONGEST, 300, step_of=KernelStep, copied_prompt=0), models["shared"]),
    ):
        _, trajectories = played(config, PRODUCTS[:3], model, decoder, sampling)
        assert others is None or [t.ids for t in others] == [t.ids for t in trajectories]
        others = trajectories
    called = 0
    for each in others or ():
        runs = turns_of(each)
        for (sampled, ids), (_, added) in pairwise(runs):
            if sampled and ids[-1] not in ENDS:
                called += 1
                assert TOKENIZER.decode(ids).endswith("</tool_call>")
                assert added[0] in ENDS and TOKENIZER.decode(added[1:]).startswith("\nResult: ")
    assert called > 2


def test_outcomes_are_told_apart(products: tuple[list[Prompt], list[Trajectory]]) -> None:
    seen: Counter[str] = Counter()
    for each in products[1]:
        assert each.episode is not None
        own: Counter[str] = Counter()
        for turn, answer in zip(each.episode.messages, each.episode.messages[1:], strict=False):
            if answer["role"] == "tool":
                outcome, text = expected_answer(turn)
                own[outcome] += 1
                assert answer["content"].startswith(text), turn
        assert own == {name: count for name, count in each.episode.outcomes.items() if count}
        seen += own
    assert seen["answered"] and seen["error"], "the sample has both"


def expected_answer(turn: dict[str, Any]) -> tuple[str, str]:
    """What the calculator says to a turn's only call, and how that counts."""
    if "tool_calls" not in turn:
        return "malformed", "Error: "
    (call,) = turn["tool_calls"]
    if call["function"]["name"] != "calculator":
        return "malformed", "Error: there is no tool"
    try:
        left, right = map(int, call["function"]["arguments"]["expression"].split("*"))
    except (KeyError, ValueError):
        return (
            ("error", "Error: ") if list(call["function"]["arguments"]) == ["expression"] else ("malformed", "Error: ")
        )
    return ("error", "Error: ValueError: no threes") if left % 10 == 3 else ("answered", str(left * right))


def test_a_game_gives_its_own_reward(models: dict[str, Any]) -> None:
    _, trajectories = played(make_config(game=True, max_turns=3), GAMES, models["shared"])
    episodes = [t.episode for t in trajectories]
    assert {e.reward for e in episodes if e} == {0.0, 1.0}
    for each, episode in zip(trajectories, episodes, strict=True):
        assert episode is not None and episode.turns <= 3
        last = [m["content"] for m in episode.messages if m["role"] == "tool"][-1:]
        assert (episode.reward == 1.0) == (last == ["right"])
        said = episode.messages[-1]
        is_answer = said["role"] == "assistant" and "<tool_call>" not in said["content"] and each.ids[-1] in ENDS
        assert each.finished == (episode.reward == 1.0 or is_answer)
        if episode.reward == 1.0:
            assert each.sampled[-1], "nothing follows the call that ended the game"


def test_the_last_turn_is_played(models: dict[str, Any]) -> None:
    _, trajectories = played(make_config(game=True, max_turns=1), GAMES, models["shared"])
    rewards = [t.episode.reward for t in trajectories if t.episode]
    assert set(rewards) == {0.0, 1.0} and rewards == [float(t.finished) for t in trajectories]
    assert all(t.episode and t.episode.turns == 1 and all(t.sampled) for t in trajectories)


def test_one_turn_is_what_is_drawn_without_episodes(models: dict[str, Any]) -> None:
    """To the last bit."""
    prompts, trajectories = played(make_config(max_turns=1), PRODUCTS, models["shared"])
    drawn = decode_all(NativeDecoder(ENDS, LONGEST, 1 << 20), models["shared"], make_requests(prompts))
    assert [(t.ids, t.logprobs) for t in trajectories] == [(t.ids, t.logprobs) for t in drawn]
    assert any(t.episode and t.episode.messages[-1].get("tool_calls") for t in trajectories)


def test_rewards_get_the_environment(models: dict[str, Any]) -> None:
    rewards = [RewardConfig("environment"), RewardConfig("played:by_number"),
               RewardConfig("played:by_half", args={"scale": 3.0})]  # fmt: skip
    config = replace(make_config(game=True, max_turns=3), rewards=rewards)
    _, trajectories = played(config, GAMES, models["shared"])
    given = [t.episode.rewards for t in trajectories if t.episode]
    for each, rewards_of in zip(trajectories, given, strict=True):
        assert each.episode is not None and each.episode.reward is not None
        done = each.episode.reward == 1.0
        assert rewards_of == {
            "played:by_number": each.episode.turns + 0.5 * done,
            "played:by_half": 1.5 if done else None,
        }
    items = [Item("", "", [1], {"environment_reward": 0.0, "environments": each}) for each in given]
    with ScorerPool(rewards[1:], ScoringConfig(num_workers=1)) as pool:
        pool.check_columns(["environments"])
        scores = pool.score(items)
        with pytest.raises(ValueError, match="needs the argument"):
            pool.check_columns(["secret"])
    assert scores.names == ["by_number", "by_half"] and not scores.failures
    assert scores.values[:, 0].tolist() == [each["played:by_number"] for each in given]


def test_a_reward_of_environments_gives_each_episode_one_value(models: dict[str, Any]) -> None:
    config = replace(make_config(game=True), rewards=[RewardConfig("environment"), RewardConfig("played:twice")])
    _, trajectories = played(config, GAMES[:1], models["shared"])
    assert all("returned 2 values for one episode" in str(t.episode.failure) for t in trajectories if t.episode)


def test_a_stop_tool_ends_the_episode(models: dict[str, Any]) -> None:
    _, trajectories = played(make_config(game=True, stop_tools=["guess"]), GAMES, models["shared"])
    assert all(t.episode and t.episode.turns == 1 and all(t.sampled) for t in trajectories)


@pytest.mark.parametrize("longest", [10, 30, 45])
def test_what_does_not_fit_is_cut(longest: int, models: dict[str, Any]) -> None:
    config = make_config(game=True, longest=longest)
    _, trajectories = played(config, GAMES, models["shared"])
    assert all(len(t.ids) <= longest for t in trajectories)
    cut = [t for t in trajectories if not t.finished]
    assert cut and all(t.sampled[-1] for t in cut), "an answer after which no token fits is not put into the row"


def test_a_turn_begins_where_one_token_fits(
    products: tuple[list[Prompt], list[Trajectory]], models: dict[str, Any]
) -> None:
    whole = next(each for each in products[1] if len(turns_of(each)) > 2)
    first, answer = (len(ids) for _, ids in turns_of(whole)[:2])
    for longest, kept in ((first - 1, first - 1), (first + answer, first), (first + answer + 1, first + answer + 1)):
        _, trajectories = played(make_config(longest=longest), PRODUCTS[: whole.group + 1], models["shared"])
        cut = trajectories[whole.group * SIZE + whole.sample]
        assert cut.ids == whole.ids[:kept] and not cut.finished and cut.sampled[-1] and cut.episode is not None
        if kept < first:
            assert "tool_calls" not in cut.episode.messages[-1], "a turn that was cut made no call"


def test_what_an_environment_says_first(models: dict[str, Any]) -> None:
    rows = [(question, {**columns, "note": f"Hint {n} #."}) for n, (question, columns) in enumerate(GAMES)]
    prompts, trajectories = played(make_config(game=True), rows, models["shared"])
    texts = [each.episode.prompt.text for each in trajectories if each.episode]
    assert len({text.split()[-2] for text in texts}) == len(GAMES), (
        "a number drawn for each prompt, for all its samples"
    )
    for each, text in zip(trajectories, texts, strict=True):
        assert each.episode is not None
        assert text.startswith(f"{GAMES[0][0]}\nHint {each.group} ") and text.endswith(".\nAnswer:")
        assert each.episode.prompt.ids == TOKENIZER(each.episode.prompt.text)["input_ids"] != prompts[each.group].ids
    end = TOKENIZER.eos_token
    _, (one, *_) = played(make_config(game=True), [(GAMES[0][0], {"secret": 1, "note": f"a{end}b"})], models["shared"])
    assert one.episode is not None and TOKENIZER.eos_token_id not in one.episode.prompt.ids
    assert f"a{end[0]} {end[1:]}b" in one.episode.prompt.text
    rows = [(GAMES[0][0], {"secret": 1, "note": "Hint. " * 40})]
    _, (first, *_) = played(make_config(game=True), rows, models["shared"])
    assert first.episode is not None and "data.max_prompt_length = 40" in str(first.episode.failure)
    assert len(first.ids) == 1 and not first.finished
    with pytest.raises(ValueError, match="began two episodes of row 0 with different texts"):
        played(make_config(game=True), [(GAMES[0][0], {"secret": 1, "note": "$"})], models["shared"])


def test_a_broken_environment_has_no_reward(models: dict[str, Any]) -> None:
    rows = [("What is 44 * 19?", {}), ("What is 12 * 15?", {})]
    _, trajectories = played(make_config(workers=1), rows, models["shared"])
    broken = [t for t in trajectories if t.episode and t.episode.failure]
    assert broken and all("exit code 1" in str(t.episode.failure) for t in broken if t.episode)
    assert all(t.ids and not t.finished for t in broken)


def test_mistakes_in_a_config(tmp_path: Path) -> None:
    for config, reason in (
        (replace(make_config(game=True), rewards=[RewardConfig("math")]), "has a get_reward"),
        (replace(make_config(), rewards=[RewardConfig("environment")]), "has no get_reward"),
        (replace(make_config(), rewards=[RewardConfig("played:by_half")]), "environment.factory is null"),
        (
            replace(make_config(game=True), rewards=[RewardConfig("played:by_half", environment=["KEY"])]),
            "name KEY in environment.secrets",
        ),
        (
            replace(make_config(game=True), rewards=[RewardConfig("played:by_half"), RewardConfig("played:by_half")]),
            "is given twice",
        ),
    ):
        with pytest.raises(ValueError, match=reason):
            open_host(config)
