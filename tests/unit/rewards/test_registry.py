"""How a config names rewards: built-in ones, functions and classes of a user, and mistakes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from grpo_dist.config.schema import RewardConfig, ScoringConfig
from grpo_dist.rewards.pool.pool import ScorerPool
from grpo_dist.rewards.registry import (
    KEYWORDS,
    answer_checks,
    answer_reader,
    declared_placement,
    file_digests,
    labels,
    resolve,
)
from grpo_dist.rewards.scores import Item


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RewardConfig("mth"), "'mth' is not a built-in reward; did you mean 'math'"),
        (RewardConfig("math", args={"corect_reward": 1}), "unexpected keyword argument 'corect_reward'"),
        (RewardConfig("math", args={"correct_reward": "much"}), "could not convert string to float"),
        (RewardConfig("no_such_module:f"), "'no_such_module' failed with ModuleNotFoundError"),
        (RewardConfig("user_rewards.py:act"), "write user_rewards:act"),
        (RewardConfig("trl.rewards.own"), r"module:function, such as trl\.rewards:own$"),
        (RewardConfig("some/reward-model"), "{name: reward_model, args: {model: some/reward-model}}"),
        (RewardConfig("user_rewards:"), "expected module:function"),
        (RewardConfig("user_rewards:lenght"), "did you mean 'length'"),
        (RewardConfig("user_rewards:not_callable"), "of type int, which cannot be called"),
        (RewardConfig("user_rewards:no_completions"), r"the signature \(prompts\); expected one"),
        (RewardConfig("user_rewards:positional"), r"the signature \(completions, /\); expected one"),
        (RewardConfig("user_rewards:seen", args={"factr": 2}), "did you mean 'factor'"),
        (RewardConfig("user_rewards:seen", args={"completions": 2}), "which every call fills in"),
        (RewardConfig("user_rewards:Counter"), "missing 1 required positional argument: 'start'"),
        (RewardConfig("broken_rewards:f"), r"No module named 'no_such_package' \(.*broken_rewards.py, line 2\)"),
        (RewardConfig("exiting_rewards:f"), "SystemExit: usage"),
    ],
)
def test_a_mistake_in_a_reward_is_said_at_once(user_directory: Path, config: RewardConfig, message: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(user_directory))
        with pytest.raises(ValueError, match=message):
            resolve(config)


def test_a_file_with_nearly_the_name_of_a_module_is_named(
    user_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(user_directory)
    with pytest.raises(ValueError, match=r"and from the Python path; near it: user_rewards\.py"):
        resolve(RewardConfig("user_reward:seen"))


def test_the_pool_says_so_too(user_directory: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'length'"):
        ScorerPool([RewardConfig("user_rewards:lenght")], ScoringConfig())
    with pytest.raises(ValueError, match=r"exited with code 5 while it imported the rewards \['dying_rewards:f'\]"):
        ScorerPool([RewardConfig("dying_rewards:f")], ScoringConfig(num_workers=1))


def test_classes_and_arguments(user_directory: Path) -> None:
    rewards = [
        RewardConfig("user_rewards:Counter", args={"start": 10}),
        RewardConfig("math", args={"correct_reward": 5, "wrong_reward": -1}),
    ]
    with ScorerPool(rewards, ScoringConfig(num_workers=1)) as pool:
        given = [Item("?", "it is 7", [1, 2], {"answer": "7"}), Item("?", "8", [1], {"answer": 7})]
        assert pool.score(given).values.tolist() == [[12.0, 5.0], [11.0, -1.0]]
        pool.check_columns(["answer"])
        with pytest.raises(ValueError, match="'math' needs the argument"):
            pool.check_columns([])


@pytest.fixture(name="own")
def _own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a module of rewards that only these tests import."""
    file = tmp_path / "own_rewards.py"
    file.write_text("""
from grpo_dist.rewards.placement import runs_in
def any_column(completions, factor, bonus=0, **columns): return [factor + bonus for _ in completions]
def named(completion_ids, *, answer, level=None): return [len(answer) for _ in completion_ids]
@runs_in("single", most_items=3)
def plays(completions, environments): return [each.score for each in environments]
class Played:
    def __call__(self, completions, environments, **columns): return [each.score for each in environments]
""")
    monkeypatch.syspath_prepend(str(tmp_path))
    return file


@pytest.mark.usefixtures("own")
def test_a_function_takes_its_keywords_and_what_is_bound_stays() -> None:
    anything = resolve(RewardConfig("own_rewards:any_column", args={"factor": 2, "extra": 1}))
    taken = [name for name in ("completions", "bonus", "answer", *KEYWORDS) if anything.parameters.takes(name)]
    assert taken == ["completions", "bonus", "answer", *KEYWORDS]
    assert not any(map(anything.parameters.takes, ("factor", "extra", "environments")))
    assert anything.function(completions=["a"], bonus=3) == [5] and anything.placement == "worker"
    anything.parameters.check_columns("own", [])
    with pytest.raises(ValueError, match=r"'own' needs the argument\(s\) factor, .* data \(none\)"):
        resolve(RewardConfig("own_rewards:any_column")).parameters.check_columns("own", [])
    named = resolve(RewardConfig("own_rewards:named")).parameters
    assert (named.accepted, named.required) == ({"completion_ids", "answer", "level"}, {"completion_ids", "answer"})
    assert named.takes("answer") and not named.takes("completions") and named.most_items is None
    with pytest.raises(ValueError, match=r"needs the argument\(s\) answer, .* \(answr, level\).*did you mean 'answr'"):
        named.check_columns("own", ["level", "answr"])


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("name", ["plays", "Played"])
def test_a_reward_of_environments_gives_elsewhere_what_it_gave_there(name: str) -> None:
    class Environment:
        score = 0.5

    config = RewardConfig(f"own_rewards:{name}")
    there, elsewhere = resolve(config, has_environments=True), resolve(config)
    assert there.function(completions=["a"], environments=[Environment()]) == [0.5]
    given = [{config.name: 0.5, "math": 1.0}, {config.name: None}, {}]
    assert elsewhere.function(completions=["a"] * 3, environments=given, answer=["5"] * 3) == [0.5, None, None]
    assert there.parameters.takes("environments") and elsewhere.parameters.takes("environments")
    assert there.placement == elsewhere.placement == declared_placement(config)
    assert (declared_placement(config), there.parameters.most_items) == (("single", 3) if name == "plays" else
                                                                         ("worker", None))  # fmt: skip


def test_answers_are_read_by_the_first_reward_that_can(user_directory: Path) -> None:
    names = ["user_rewards:length", "length", "boxed", "gsm8k"]
    reader = answer_reader([RewardConfig(name) for name in names])
    assert reader is not None and reader(r"#### 4 and \boxed{5}") == "5"
    assert answer_reader([RewardConfig(name) for name in names[:2]]) is None
    checks = answer_checks([RewardConfig(name) for name in ("user_rewards:length", "length", "math", "gsm8k")])
    assert len(checks) == 2
    for check in checks:
        check("5")
        with pytest.raises(ValueError, match="''"):
            check("")


def test_files_of_rewards_have_a_digest_and_are_not_imported(
    user_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module, a package, and none for what is built in or not there; the first place of an import counts."""
    package = tmp_path / "a" / "package_of_rewards"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit")
    (package / "inner.py").write_text("raise SystemExit(2)")
    monkeypatch.syspath_prepend(str(tmp_path / "a"))
    names = ["dying_rewards:f", "package_of_rewards:f", "package_of_rewards.inner:g", "math", "no_such:f"]
    files = [user_directory / "dying_rewards.py", package / "__init__.py", package / "inner.py"]
    digests = file_digests(names)
    assert digests == {
        name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in zip(names, files, strict=False)
    }
    (tmp_path / "a" / "dying_rewards.py").write_text("# before the current directory")
    assert file_digests(names[:1]) != {names[0]: digests[names[0]]}


def test_labels_are_short_and_unique() -> None:
    names = ["math", "a.b:f", "c:f", "c:Class.method", "math"]
    assert labels([RewardConfig(name) for name in names]) == ["math", "f", "f_2", "method", "math_2"]
