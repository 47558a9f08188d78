"""Every exception that flexalign raises on purpose.

The tree::

    FlexAlignError
    ├── ConfigError(ValueError)            a setting is unknown, missing or contradictory
    ├── LambdaError(ValueError)            a λ is not a finite number, or does not fit the batch
    ├── DataError(ValueError)              a row, a file or a data set cannot be used
    ├── PairMismatchError(ValueError)      two models do not fit together
    ├── UnsupportedModelError(ValueError)  a model of a kind that the method cannot serve
    ├── CheckpointError(RuntimeError)      a checkpoint is missing, half written or corrupt
    └── ServingError(RuntimeError)         a server or an engine failed

The leaves also derive from a built-in exception, so ``except ValueError`` catches them.
A message says what is wrong, where, and what to do. On the command line a ``ValueError`` leaf
ends with exit code 2 (wrong input), a ``RuntimeError`` leaf with 1 (failed while running).
"""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "FlexAlignError",
    "LambdaError",
    "PairMismatchError",
    "ServingError",
    "UnsupportedModelError",
]


class FlexAlignError(Exception):
    """Base of all errors raised by flexalign."""


class ConfigError(FlexAlignError, ValueError):
    """A setting is unknown, missing, or contradicts another one."""


class WeightsWaitError(ConfigError):
    """Weights are needed that a dry run leaves at the hub; raised and caught as a ConfigError."""


class LambdaError(FlexAlignError, ValueError):
    """A λ is not a finite number, is outside the permitted range, or does not fit the batch."""


class DataError(FlexAlignError, ValueError):
    """A row, a file or a whole data set cannot be used."""


class PairMismatchError(FlexAlignError, ValueError):
    """Two models do not fit together: other tokens, other widths, an adapter of another base."""


class UnsupportedModelError(FlexAlignError, ValueError):
    """A model is of a kind that the method cannot serve."""


class CheckpointError(FlexAlignError, RuntimeError):
    """A checkpoint or a model folder is missing, half written or corrupt."""


class ServingError(FlexAlignError, RuntimeError):
    """A server or an inference engine failed."""


class ServerUnusableError(ServingError):
    """A server fails one request as it would fail every other; caught as a ServingError."""


class RequestRefusedError(ServingError):
    """A server refused a request for what it holds; it may answer others. Caught as a ServingError."""


@contextmanager
def as_input_errors() -> Iterator[None]:
    """Treat a damaged file that the user gave as wrong input.

    Raises:
        ConfigError: Instead of a `CheckpointError`, with the same message.
    """
    try:
        yield
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
