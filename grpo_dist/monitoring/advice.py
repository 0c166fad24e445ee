"""What to do about an alarm: alarms.md beside this file, as plain text."""

from __future__ import annotations

import functools
import re
from pathlib import Path


@functools.cache
def advice(name: str) -> str:
    """The words about an alarm, in one line. Raises KeyError for a name without any."""
    sections = re.split(r"^## (\w+)$", Path(__file__).with_name("alarms.md").read_text(encoding="utf-8"), flags=re.M)
    text = dict(zip(sections[1::2], sections[2::2], strict=True))[name]
    return " ".join(re.sub(r"\[(.+?)\]\(.+?\)", r"\1", text).replace("`", "").split())
