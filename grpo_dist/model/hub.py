"""What the hub is asked before transformers asks it: whether a model is an adapter, and whether it answers at all."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from huggingface_hub import hf_hub_download, is_offline_mode
from huggingface_hub.errors import LocalEntryNotFoundError

from ..text.files import near_paths
from .files import stored_file


def adapter_config(option: str, place: str, revision: str | None) -> Path | None:
    """The adapter_config.json of a directory or repository, which an option names; None where there is none, and for
    what is no repository, which those who load the model report.

    Raises OSError where the hub does not answer, unless its cache on this machine has the model. That takes half a
    minute of repeated requests, and each of the files that transformers would ask for next takes as long again.
    """
    if Path(place).is_dir():
        return stored_file(place, "adapter_config.json")
    return _from_hub(option, place, revision)


@cache
def _from_hub(option: str, place: str, revision: str | None) -> Path | None:
    try:
        return Path(hf_hub_download(place, "adapter_config.json", revision=revision))
    except LocalEntryNotFoundError as error:
        if is_offline_mode() or stored_file(place, "config.json", revision) is not None:
            return None
        raise OSError(f"{option}: {place!r} is no directory in {Path.cwd()}{near_paths(place)}, and the hub does not "
                      f"answer: {error.__cause__ or error}. Name a directory with the model, or download it where the "
                      f"hub can be reached: `hf download {place} --local-dir DIRECTORY`") from error  # fmt: skip
    except (OSError, ValueError):
        return None
