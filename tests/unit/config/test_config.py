"""Configs: what is good comes out typed, and every mistake is answered by name before anything heavy is imported."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from grpo_dist.config import schema as config_module
from grpo_dist.config.evaluation import read_options
from grpo_dist.config.mistakes import read_options as read_run_options
from grpo_dist.config.names import option_types
from grpo_dist.config.parse import checked, let_first_rank_answer, parse_config, refuse_mistaken_options
from grpo_dist.config.schema import Config, LoraConfig


def parse(tmp_path: Path, text: str, *overrides: str) -> Config:
    """The config of a YAML text and overrides."""
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return parse_config(["--config", str(file), *overrides])


@pytest.mark.quick
def test_defaults_are_the_dataclasses() -> None:
    assert parse_config([]) == Config()


@pytest.mark.quick
def test_yaml_and_overrides(tmp_path: Path) -> None:
    config = parse(
        tmp_path,
        """
        model: {name: some/model, dtype: bfloat16}
        lora: {r: 4, target_modules: [q_proj, v_proj]}
        rewards:
          - name: math
          - {name: "mine:reward", weight: 0.5, args: {strict: true}}
        rollout: {group_size: 4, temperature: 1}
        optim: {learning_rate: 1e-5, betas: [0.9, 0.95]}
        train: {batch_size: 8, max_tokens_per_pack: 8192}
        """,
        "--rollout.temperature", "0.7", "--train.batch_size=16", "--data.eval_file", "null", "--loss.kl_coeff", "1e-3",
    )  # fmt: skip
    assert config.model.name == "some/model" and config.model.dtype == "bfloat16"
    assert config.lora == LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    assert [reward.name for reward in config.rewards] == ["math", "mine:reward"]
    assert config.rewards[1].args == {"strict": True} and config.rewards[1].weight == 0.5
    assert isinstance(config.optim.learning_rate, float) and config.optim.learning_rate == 1e-5
    assert config.optim.betas == (0.9, 0.95)
    assert config.rollout.temperature == 0.7 and config.rollout.group_size == 4
    assert config.train.batch_size == 16 and config.train.max_tokens_per_pack == 8192
    assert config.data.eval_file is None
    assert config.loss.kl_coeff == 1e-3
    assert config.scoring == Config().scoring


@pytest.mark.quick
def test_options_override_files_wherever_they_stand(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("train: {seed: 1, batch_size: 4}\nloss: {clip_high: 0.5}")
    second.write_text("train: {seed: 2, batch_size: 8}")
    words = ["--train.seed", "3", "--config", str(first), f"--config={second}", "--preset", "dapo"]
    for config in (parse_config(words), read_run_options(words).config):
        assert (config.train.seed, config.train.batch_size, config.loss.clip_high) == (3, 8, 0.5)
        assert config.loss.aggregation == "token_mean", "the preset's"


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "0.00001"])
def test_numbers_with_exponents_are_floats(text: str, tmp_path: Path) -> None:
    from_yaml = parse(tmp_path, f"optim: {{learning_rate: {text}}}").optim.learning_rate
    from_cli = parse_config(["--optim.learning_rate", text]).optim.learning_rate
    assert isinstance(from_yaml, float) and from_yaml == from_cli == 1e-5


TEXTS = ["007", "1e5", "yes", "null", "####", "# Task", "---", "[0-9]", "Rate: {completion}", "12:30", "- x"]
"""In quotes, for YAML; without them each is something else."""


def test_quoted_texts_stay_texts(tmp_path: Path) -> None:
    texts = json.dumps(TEXTS)
    config = parse(tmp_path, f"""
        data: {{system_prompt: "# Task", prompt_column: "null", keep: {{level: "4", kind: {texts}}}}}
        rollout: {{stop: {texts}, banned_tokens: [5, "5"]}}
        rewards: [{{name: "mine:reward", args: {{marker: "####", deeper: {{list: {texts}}}}}}}]
        """)  # fmt: skip
    assert config.data.system_prompt == "# Task" and config.data.prompt_column == "null"
    assert config.data.keep == {"level": "4", "kind": TEXTS}
    assert config.rollout.stop == TEXTS and config.rollout.banned_tokens == [5, "5"]
    assert config.rewards[0].args == {"marker": "####", "deeper": {"list": TEXTS}}
    assert type(config.rewards[0].args["marker"]) is type(config.data.system_prompt) is str
    assert checked(config) == config


def test_words_that_yaml_takes_for_comments() -> None:
    assert parse_config(["--data.system_prompt", "# Task"]).data.system_prompt == "# Task"
    assert parse_config(["--data.system_prompt", "null"]).data.system_prompt is None
    assert parse_config(["--rewards", '[{"name": "math", "args": {"marker": "#"}}]']).rewards[0].args == {"marker": "#"}


def test_the_printed_config_is_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--data.system_prompt",
        "# 數",
        "--lora",
        "null",
        "--rewards",
        '[{"name": "math", "args": {"markers": ["007", "1e5", "1.5e3", 1e5]}}]',
    ]
    with pytest.raises(SystemExit) as ended:
        parse_config([*words, "--print_config"])
    assert not ended.value.code and parse(tmp_path, capsys.readouterr().out) == parse_config(words)
    with pytest.raises(SystemExit):
        parse_config(["--print_config", "--train.batch_size", "many", "--optim.optimizer", "adamw"])
    assert capsys.readouterr().err == "error: train.batch_size: 'many' given, expected a whole number\n"
    with pytest.raises(SystemExit):
        parse(tmp_path, "model: {revision: '12e34'}\ntrain: {batch_size: many}")
    assert capsys.readouterr().err.count("error") == 1


def test_one_option_of_a_group_that_was_null(tmp_path: Path) -> None:
    assert parse(tmp_path, "advantage: null", "--advantage.baseline", "none").advantage.baseline == "none"


def test_lora_null_is_full_fine_tuning(tmp_path: Path) -> None:
    assert parse(tmp_path, "lora: null").lora is None
    assert parse_config(["--lora", "null"]).lora is None
    assert parse(tmp_path, "lora: {r: 8}").lora == LoraConfig(r=8)
    assert parse_config(["--lora.r", "8"]).lora == LoraConfig(r=8)


BAD: dict[str, tuple[str, list[str], list[str]]] = {
    "of a group": ("lora: {dropout: 0.1, target_parameters: [a.b]}", [],
                   ["error: lora.dropout: 0.1 given, expected 0 with lora.target_parameters (in "]),
    # name: (YAML, overrides, what the message has to name: key, value, expectation)
    "unknown key in yaml": ("rollout: {grup_size: 4}", [], ["grup_size", "rollout.group_size"]),
    "unknown group in yaml": ("rolout: {group_size: 4}", [], ["rolout", "did you mean 'rollout'"]),
    "unknown key in cli": ("train: {seed: 1}", ["--train.batchsize", "4"], ["batchsize", "train.batch_size"]),
    "unknown leaf in cli": ("train: {seed: 1}", ["--rollout.temprature", "0.5"], ["temprature", "rollout.temperature"]),
    "abbreviated leaf in cli": ("train: {seed: 1}", ["--optim.learning_rat", "0.5"],
                                ["optim.learning_rat", "did you mean 'optim.learning_rate'"]),
    "abbreviated preset": ("train: {seed: 1}", ["--pres", "dapo"], ["pres: 'dapo'", "did you mean 'preset'"]),
    "dora": ("lora: {use_dora: true}", [], ["use_dora", "DoRA is not supported", "lora.use_rslora"]),
    "biases in cli": ("train: {seed: 1}", ["--lora.bias", "all"], ["lora.bias", "biases stay", "`lora: null`"]),
    "modules beside adapters": ("lora: {modules_to_save: [lm_head]}", [], ["modules_to_save", "lora.target_modules"]),
    "logit bias": ("rollout: {logit_bias: {a: 2}}", [], ["logit_bias", "rollout.banned_tokens"]),
    "what another launcher adds": ("train: {seed: 1}", ["--local_rank=0"],
                                   ["local_rank: '0'", "zero2.yaml", "--no_local_rank"]),
    "name of TRL": ("num_generations: 8", [],
                    ["num_generations", "another library", "rollout.group_size", "from_trl.md"]),
    "name of PEFT in cli": ("train: {seed: 1}", ["--lora.lora_alpha", "8"], ["lora_alpha", "here: lora.alpha"]),
    "name that is near to another": ("rollout: {max_new_tokens: 8}", [],
                                     ["max_new_tokens", "here: rollout.max_completion_length"]),
    "name of several options": ("dtype: bfloat16", [], ["did you mean 'model.dtype'?"]),
    "a name where names are expected": ("logging: {trackers: wandb}", [],
                                        ["'wandb' given in ", "did you mean [wandb]?"]),
    "no name where names are expected": ("train: {seed: 1}", ["--logging.trackers", "none"], ["did you mean []?"]),
    "a reward's name alone": ("train: {seed: 1}", ["--rewards", "my:own"], ["did you mean [{name: my:own}]?"]),
    "rewards' names alone": ("rewards: [math, length]", [], ["did you mean [{name: math}, {name: length}]?"]),
    "key in the wrong group": ("train: {learning_rate: 1.0}", [], ["learning_rate", "optim.learning_rate"]),
    "text for a number": ("train: {batch_size: many}", [],
                          ["train.batch_size: 'many' given in ", "config.yaml, expected a whole number\n"]),
    "text for a number in cli": ("train: {seed: 1}", ["--optim.learning_rate", "fast"],
                                 ["error: optim.learning_rate: 'fast' given, expected a number\n"]),
    "fraction for a count": ("rollout: {group_size: 2.5}", [],
                             ["rollout.group_size: 2.5 given in ", "expected a whole number"]),
    "float16 for the policy": ("model: {dtype: float16}", [],
                               ["model.dtype: 'float16' given", "one of auto, float32, bfloat16"]),
    "not one of the choices": ("loss: {objective: ppo}", [], ["loss.objective", "ppo", "grpo"]),
    "unknown key in a reward": ("rewards: [{nmae: math}]", [], ["rewards.nmae: 'math'", "did you mean 'name'?"]),
    "text for a number in a reward": ("rewards: [{name: math}, {weight: x}]", [],
                                      ["rewards.weight: 'x' given in ", "config.yaml, expected a number\n"]),
    "infinite in a reward": ("rewards: [{weight: .inf}]", [], ["rewards.weight: inf given, expected a finite number"]),
    "not a number in a schedule": ("rewards: [{schedule: {0: .nan}}]", [], ["rewards.schedule: {0: nan} given"]),
    "text for a group": ("lora: big", [], ["lora: 'big' given", "a group of options (r, alpha", ") or null"]),
    "text for a list": ("environment: {tools: x}", [], ["environment.tools: 'x'", "a list in which each is text"]),
    "text in a mapping": ("rewards: [{schedule: {a: 1}}]", [],
                          ["rewards.schedule: {'a': 1}", "a number for each whole number or null"]),
    "three for two": ("optim: {betas: [0, 0, 0]}", [], ["optim.betas: [0, 0, 0]", "a list of 2, each a number"]),
    "a name or a number": ("rollout: {max_tokens_in_flight: x}", [],
                           ["rollout.max_tokens_in_flight: 'x'", "expected a whole number or auto"]),
    "a seed of 65 bits": ("train: {seed: 18446744073709551616}", [],
                          ["train.seed: 18446744073709551616 given, expected a whole number from 0 to 2**63 - 1"]),
    "a word": ("train: {seed: 1}", ["stray"], ["'stray' given on the command line, expected options such as"]),
    "nothing for a group": ("train: {seed: 1}", ["--environment.factory", "null"],
                            ["error: environment: None given, expected tools, a factory, or both\n"]),
    "several": ("train: {sed: 1}", ["--rollout.group_size", "x"],
                ["error: train.sed: 1 given in", "\nerror: rollout.group_size: 'x' given, expected a whole number\n"]),
    "group of one": ("rollout: {group_size: 1}", [], ["rollout.group_size", "1", "at least 2"]),
    "group of one in cli": ("train: {seed: 1}", ["--rollout.group_size", "1"],
                            ["rollout.group_size", "1", "at least 2"]),
    "negative kl": ("loss: {kl_coeff: -0.1}", [], ["loss.kl_coeff", "-0.1", "0 or more"]),
    "no temperature": ("rollout: {temperature: 0}", [], ["rollout.temperature", "0", "above 0"]),
    "top_p above 1": ("rollout: {top_p: 1.5}", [], ["rollout.top_p", "1.5", "(0, 1]"]),
    "rank 0": ("lora: {r: 0}", [], ["lora.r", "0", "at least 1"]),
    "not a number": ("optim: {learning_rate: .nan}", [], ["optim.learning_rate", "nan", "above 0"]),
    "infinite": ("optim: {learning_rate: .inf}", [], ["optim.learning_rate: inf given, expected a finite number (in "]),
    "budget too small": ("train: {max_tokens_per_pack: 100}", [],
                         ["train.max_tokens_per_pack", "100", "data.max_prompt_length", "768"]),
    "room too small": ("rollout: {max_tokens_in_flight: 100}", [], ["rollout.max_tokens_in_flight", "100", "768"]),
    "no reward that counts": ("rewards: [{weight: 0}, {name: length, schedule: {0: 0}}]", [],
                              ["rewards.weight: [0.0, 1.0] given, expected one that counts"]),
    "no reward that counts at first": ("rewards: [{schedule: {0: 0, 9: 1}}]", [],
                                       ["rewards.schedule: [{0: 0.0, 9: 1.0}]", "all weights are 0 in step 0"]),
    "no reward that counts at last": ("rewards: [{schedule: {0: 1, 20: 0}}, {weight: 0}]", [],
                                      ["rewards.schedule", "all weights are 0 in step 20"]),
    "no reward": ("rewards: []", [], ["rewards", "[]", "at least one"]),
    "shared reference without lora": ("lora: null\nreference: {placement: shared}", [],
                                      ["reference.placement", "shared", "lora is null"]),
    "warmup above the steps": ("optim: {warmup_steps: 101}", [], ["optim.warmup_steps", "101", "num_train_steps"]),
    "system prompt without template": ("data: {system_prompt: Hi, chat_template: never}", [],
                                       ["data.system_prompt", "Hi", "chat_template"]),
    "null for a group": ("advantage: null", [], ["advantage", "None"]),
    "a list for a group": ("advantage: []", [], ["advantage", "[]"]),
    "null for a number": ("loss: {sapo_temperature_negative: null}", [], ["loss.sapo_temperature_negative", "None"]),
    "null in a reward": ("rewards: [{name: math, weight: null}]", [], ["rewards.weight", "None"]),
    "comments alone": ("# train: {seed: 1}", [], ["config.yaml has no option, expected some such as `train: {…}`"]),
    "a list of options": ("- train", [], ["config.yaml contains ['train'], expected options such as `train: {…}`"]),
    "a group twice": ("train: {seed: 1}\nlora: {r: 2}\ntrain: {batch_size: 4}", [],
                      ["train is given in lines 1 and 3 of", "config.yaml", "expected once"]),
    "an option twice": ("rewards:\n- name: math\n  weight: 1\n  weight: 2", [], ["rewards.weight", "lines 3 and 4"]),
    "an anchor within its value": ("train: &all\n  seed: *all", [], ["config.yaml", "whose own value refers to it"]),
    "anchors that multiply": ("\n".join(f"a{n}: &a{n} [{f'*a{n - 1},' * 9 if n else 'lol'}]" for n in range(99)), [],
                              ["config.yaml has more than 100,000 values when each alias"]),
    "a value without end": (f"train: {{seed: {'x' * 9999}}}", [], ["train.seed: 'xxx", "xxx … xxx"]),
    "a number that begins with 0": ("train:\n  num_train_steps: 0100", [],
                                    ["0100 in line 2 of", "to base 8", "'0100', or leave out the zero before it"]),
    "a time without quotes": ("train:\n  max_time: 1:30:00", [],
                              ["1:30:00 in line 2 of", "put it in quotes, '1:30:00'"]),
    "an endless weight": ("rewards: [{weight: -1e300}]", [],
                          ["rewards.weight", "-1e+300", "a finite number of at most 1e30"]),
    "broken yaml": ("rollout: {group_size: 4", [], ["config.yaml"]),
    "a list": ("- 1\n- 2", [], ["config.yaml"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, overrides, expected = BAD[name]
    with pytest.raises(SystemExit) as stop:
        parse(tmp_path, text, *overrides)
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert "Traceback" not in message
    missing = [part for part in expected if part not in message]
    assert not missing, f"{missing} not in:\n{message}"


def test_options_are_read_once_for_both_who_ask() -> None:
    words = ["--train.seed", "5"]
    config = refuse_mistaken_options(words)
    assert config is not None and config.train.seed == 5
    assert parse_config(words) is config
    assert parse_config(words) is not config, "whoever asks again gets one that nobody has changed"
    assert refuse_mistaken_options([*words, "--dry_run"]) is None


def test_other_ranks_wait_for_the_first_ones_message(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("grpo_dist.config.parse.time.sleep", slept.append)
    for node_rank, rank in (("0", "2"), ("1", "0")):
        monkeypatch.setenv("LOCAL_RANK", node_rank)
        monkeypatch.setenv("RANK", rank)
        let_first_rank_answer(seconds=1.0)
        let_first_rank_answer("RANK", seconds=3.0)
    assert slept == [3.0, 1.0]
    monkeypatch.delenv("LOCAL_RANK")
    let_first_rank_answer()
    assert slept == [3.0, 1.0], "without a launcher there is no other rank"


def test_the_home_directory_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell puts it into a file's paths, and a run must not make a directory `~`."""
    monkeypatch.setenv("HOME", "/home/me")
    text = "data: {train_file: {~/a.jsonl: 1, b~.jsonl: 2}, eval_file: ~/e.jsonl}\ntrain: {output_dir: ~/runs/one}"
    config = parse(tmp_path, text)
    assert config.data.train_file == {"/home/me/a.jsonl": 1.0, "b~.jsonl": 2.0}
    assert (config.data.eval_file, config.train.output_dir) == ("/home/me/e.jsonl", "/home/me/runs/one")


def test_files_of_other_editors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mark of the byte order is no text, and what is not UTF-8 is named."""
    file = tmp_path / "config.yaml"
    file.write_text("train: {seed: 3}", encoding="utf-8-sig")
    assert parse_config(["--config", str(file)]).train.seed == 3
    file.write_text("train: {seed: 3}", encoding="utf-16")
    with pytest.raises(SystemExit):
        parse_config(["--config", str(file)])
    assert f"{file} is no UTF-8 text (invalid start byte in byte 0); save it" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nowhere.yaml", "."])
def test_a_config_that_is_not_a_file(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_config(["--config", str(tmp_path / name)])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and str(tmp_path) in message and "config" in message


def test_nothing_heavy_is_imported() -> None:
    heavy = ("torch", "transformers", "peft", "accelerate", "datasets")
    code = ("import sys, grpo_dist.config.parse as c; c.parse_config([]); "
            f"print([m for m in {heavy} if m in sys.modules])")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True,
                          cwd=Path(__file__).parents[3])  # fmt: skip
    assert done.stdout.strip() == "[]"


GROUPS = [cls for _, cls in inspect.getmembers(config_module, inspect.isclass)
          if is_dataclass(cls) and cls is not Config]  # fmt: skip


@pytest.mark.parametrize("cls", [*GROUPS, Config], ids=lambda cls: cls.__name__)
def test_every_field_is_documented(cls: type) -> None:
    assert cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}(")
    (body,) = (node.body for node in ast.parse(inspect.getsource(sys.modules[cls.__module__])).body
               if isinstance(node, ast.ClassDef) and node.name == cls.__name__)  # fmt: skip
    documented = {
        node.target.id for node, after in pairwise(body)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
    }  # fmt: skip
    groups = {group.__name__ for group in GROUPS}
    for field in fields(cls):
        nested = str(field.type).removesuffix(" | None") in groups  # a group is documented by its own class
        assert field.name in documented or nested, f"{cls.__name__}.{field.name} has no docstring"


def test_option_types_are_the_fields() -> None:
    keys = list(option_types())
    assert {"rollout", "rollout.group_size", "lora.r", "train.seed", "rewards"} <= set(keys)
    assert len(keys) == len(set(keys))


def test_models_are_evaluated_by_the_weights_of_their_last_step(tmp_path: Path) -> None:
    text = "rewards: [{name: math, weight: 2}, {name: boxed, schedule: {0: 1.0, 4: 0.0}}]\ntrain: {num_train_steps: 4}"
    config = parse(tmp_path, text)
    assert [config.weights_after(steps) for steps in range(5)] == [[2, 1], [2, 1], [2, 0.75], [2, 0.5], [2, 0.25]]
    words = ["--config", str(tmp_path / "config.yaml"), "--model", "toy", "--data", "data.jsonl"]
    evaluated = read_options(words)[1].rewards
    assert [(reward.weight, reward.schedule) for reward in evaluated] == [(2, None), (0.25, None)]


@pytest.mark.parametrize(("words", "expected"), [
    (("--lora.init_from", "an/adapter"), "--lora.init_from: 'an/adapter' given, which an evaluation does not read"),
    (("--lora", "{init_from: an/adapter}"), "which an evaluation does not read: give the adapter as --model"),
    (("--model.name", "toy-carry"), "--model.name: 'toy-carry' given, beside --model: expected one of them"),
])  # fmt: skip
def test_an_evaluation_refuses_a_model_that_it_would_not_read(
    words: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It evaluated the base alone, without a word."""
    given = ["--model", "toy", "--data", "configs/data/math_tasks_eval.jsonl"]
    with pytest.raises(SystemExit):
        read_options([*given, *words])
    assert expected in capsys.readouterr().err
    (tmp_path / "run.yaml").write_text("lora: {init_from: an/adapter}\nmodel: {name: elsewhere}\n")
    read_options([*given, "--config", str(tmp_path / "run.yaml"), "--lora.r", "8"])  # where a training began
