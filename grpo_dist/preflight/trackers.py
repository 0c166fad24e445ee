"""Check that the trackers of a config are known, installed and reachable."""

from __future__ import annotations

import importlib.util
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ..monitoring.trackers import require_known
from .findings import Findings

_CONNECT_SECONDS = 3.0


@dataclass(frozen=True)
class Service:
    """The server of a tracker."""

    variable: str
    """Environment variable that names its address."""
    address: str
    """Its address where the variable is not set; empty if the tracker is then local."""
    key: str
    """Environment variable with the credentials; empty if the tracker needs none."""
    login: str
    """File in the home directory where its client stores a login."""


SERVICES = {
    "wandb": Service("WANDB_BASE_URL", "https://api.wandb.ai", "WANDB_API_KEY", ".netrc"),
    "comet_ml": Service("COMET_URL_OVERRIDE", "https://www.comet.com", "COMET_API_KEY", ".comet.config"),
    "swanlab": Service("SWANLAB_API_HOST", "https://api.swanlab.cn", "SWANLAB_API_KEY", ".swanlab/.netrc"),
    "mlflow": Service("MLFLOW_TRACKING_URI", "", "", ""),
}
"""Trackers with a server."""


def check_trackers(names: list[str], findings: Findings) -> None:
    """Note whether each tracker is known, installed, has credentials and is reachable."""
    for name in names:
        try:
            require_known([name])
        except ValueError as error:
            findings.problems.append(str(error))
            continue
        if importlib.util.find_spec(name) is None:
            findings.problems.append(f"logging.trackers: {name!r} given, but its package is not installed: "
                                     f"pip install {name}, or leave it out")  # fmt: skip
        elif name in SERVICES and not (name == "wandb" and os.environ.get("WANDB_MODE") in ("offline", "disabled")):
            problem = unreachable(SERVICES[name])
            if problem:
                findings.problems.append(f"logging.trackers: {name!r} given, but {problem}")
            else:
                findings.results.setdefault("trackers", []).append(f"{name}: reached")
        else:
            findings.results.setdefault("trackers", []).append(f"{name}: installed")


def unreachable(service: Service) -> str | None:
    """Return the reason why a tracker's server is not usable. None if it answers or is local."""
    address = urlsplit(os.environ.get(service.variable) or service.address)
    if not address.hostname:
        return None
    if service.key and service.key not in os.environ and not _logged_in(service.login, address.hostname):
        return f"there are no credentials for {address.hostname}: log in, or set {service.key}"
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname, port), _CONNECT_SECONDS).close()
    except OSError as error:
        return (f"{address.hostname} does not answer within {_CONNECT_SECONDS:g} s ({error}); without a "
                "network, use its offline mode or tensorboard")  # fmt: skip
    return None


def _logged_in(login: str, host: str) -> bool:
    """Whether a client's login file exists and, if it is for several hosts, names this one."""
    file = Path(os.environ.get("NETRC") or Path.home() / login) if login == ".netrc" else Path.home() / login
    return file.is_file() and (not login.endswith(".netrc") or host in file.read_text(errors="replace"))
