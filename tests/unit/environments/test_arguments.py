"""Arguments of calls against the schemas that the model reads."""

from __future__ import annotations

from enum import Enum
from typing import Any, Literal

import pytest
from transformers.utils import get_json_schema

from grpo_dist.environments.arguments import misfit


class Unit(Enum):
    CELSIUS = "c"
    KELVIN = "k"


def tool(
    whole: int, share: float = 0.5, exact: bool = False, text: str = "", unit: Unit = Unit.KELVIN,
    most: Literal[1, 2] = 1, perhaps: int | None = None, several: int | str = 1, list_of: list[int] = [],  # noqa: B006
    pair: tuple[int, str] = (1, ""), table: dict[str, float] = {}, either: list[int] | str = "", anything: Any = 0,  # noqa: B006
) -> None:  # fmt: skip
    """
    Take arguments of every kind.

    Args:
        whole: A number.
        share: A number.
        exact: Yes or no.
        text: A text.
        unit: One of two.
        most: One of two.
        perhaps: A number or nothing.
        several: Of two types.
        list_of: Numbers.
        pair: Of a number and a text.
        table: Numbers by name.
        either: Numbers or a text.
        anything: Anything.
    """


PARAMETERS = get_json_schema(tool)["function"]["parameters"]


@pytest.mark.parametrize(
    "given",
    [
        {}, {"share": 1}, {"share": 0.1}, {"exact": True}, {"text": "é"}, {"unit": "c"}, {"most": 2}, {"perhaps": None},
        {"perhaps": 3}, {"several": "1"}, {"several": 1}, {"list_of": []}, {"list_of": [1, 2]}, {"pair": [1, "a"]},
        {"table": {"a": 1, "b": 0.5}}, {"either": [1]}, {"either": "a"}, {"anything": [None, {"a": []}]},
    ],
)  # fmt: skip
def test_what_fits(given: dict[str, Any]) -> None:
    assert misfit({"whole": 1} | given, PARAMETERS) is None


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"whole": "1"}, 'whole is "1", expected an integer'),
        ({"whole": 1.0}, "whole is 1.0, expected an integer"),
        ({"whole": True}, "whole is true, expected an integer"),
        ({"whole": None}, "whole is null, expected an integer"),
        ({"share": True}, "share is true, expected a number"),
        ({"exact": 1}, "exact is 1, expected a boolean"),
        ({"text": ["é" * 99]}, f'text is ["{"é" * 57}…, expected a string'),
        ({"unit": "f"}, 'unit is "f", expected one of "c", "k"'),
        ({"most": 3}, "most is 3, expected one of 1, 2"),
        ({"perhaps": "x"}, 'perhaps is "x", expected an integer'),
        ({"several": 1.5}, "several is 1.5, expected an integer or a string"),
        ({"list_of": {"a": 1}}, 'list_of is {"a": 1}, expected an array'),
        ({"list_of": [1, "x"]}, 'list_of[1] is "x", expected an integer'),
        ({"pair": [1, 2]}, "pair[1] is 2, expected a string"),
        ({"table": {"a": "x"}}, 'table.a is "x", expected a number'),
        ({"either": 1}, "either is 1, which it cannot be"),
        ({"wohle": 1}, f"there is no argument 'wohle'; there are {', '.join(PARAMETERS['properties'])}"),
    ],
)
def test_what_does_not_fit(given: dict[str, Any], reason: str) -> None:
    assert misfit({"whole": 1} | given, PARAMETERS) == reason


def test_a_missing_argument() -> None:
    assert misfit({"share": 1}, PARAMETERS) == "the argument 'whole' is missing"


def test_a_tool_without_arguments() -> None:
    def now() -> str:
        """Tell the time."""
        return ""

    parameters = get_json_schema(now)["function"]["parameters"]
    assert misfit({}, parameters) is None
    assert misfit({"zone": "x"}, parameters) == "there is no argument 'zone'; there are none"
