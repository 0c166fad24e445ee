"""Values and results of every kind. A completion names the one that is returned."""

import numpy as np

VALUES = {
    "none": None,
    "true": True,
    "int": 3,
    "zero_dim": np.array(2.5),
    "float32": np.float32(0.5),
    "nan": float("nan"),
    "inf": float("inf"),
    "text": "1.0",
    "huge": 10**400,
    "large": -1e31,
    "complex": 1j,
    "list": [1.0, 2.0],
    "per_token": [0.5, None, 1.0],
}
RESULTS = {
    "scalar": 1.0,
    "nothing": None,
    "text": "1",
    "dict": {"a": 1.0},
    "short": [],
    "long": [1.0, 2.0],
    "zero_dim": np.array(1.0),
    "two_dims": np.ones((1, 2)),
    "array": np.array([4.0]),
    "tuple": (4,),
    "generator": (value for value in [4.0]),
}


def value(completions):
    return [VALUES[completion] for completion in completions]


def logged(completions, log_extra):
    log_extra("value", [VALUES[completion] for completion in completions])
    return [1.0] * len(completions)


def result(completions):
    return RESULTS[completions[0]]
