"""The `remote` reward: a service of your own scores the completions over HTTP.

It receives a POST with JSON, one entry for each completion in each list,

    {"prompts": […], "completions": […], "COLUMN": […], …}

and answers `{"rewards": […]}`. An entry is a number, null where the reward does not apply, or `{"error": "…"}` where
the completion could not be scored. A service that fails after all retries leaves its completions unscored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .http import Client, ServiceError
from .placement import runs_in
from .text import LogMetric

_NOT_SENT = ("completion_ids", "trainer_state")


@runs_in("single", most_items=32)
class RemoteReward:
    """Reward completions by the answers of a service."""

    def __init__(
        self, url: str, auth_variable: str | None = None, retries: int = 4, request_seconds: float = 30.0
    ) -> None:
        """See `http.Client` for the arguments and the errors."""
        self._client = Client(url, auth_variable, concurrency=1, retries=retries, request_seconds=request_seconds)

    async def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        log_metric: LogMetric | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **columns: Any,
    ) -> list[Any]:
        """Score completions by the service; an exception stands for one that stays unscored."""
        sent = {name: values for name, values in columns.items() if name not in _NOT_SENT}
        count = len(completions)
        try:
            reply = await self._client.post(
                {"prompts": prompts, "completions": completions, **sent}, lambda content: _read(content, count)
            )
        except ServiceError as error:
            # returned, not raised: after an error the pool would call again for each completion
            return [error] * count
        if log_metric:
            log_metric("latency_seconds", reply.seconds)
            log_metric("retries", reply.retries)
        return reply.content


def _read(content: Any, count: int) -> list[Any]:
    rewards = content["rewards"]
    if not isinstance(rewards, list) or len(rewards) != count:
        raise ValueError(f"`rewards` has to be a list of {count} entries")
    return [ServiceError(str(entry["error"])) if isinstance(entry, dict) else entry for entry in rewards]
