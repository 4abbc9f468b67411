"""The errors of pullback: one tree, stdlib parents.

PullbackError
|-- DatumError (ValueError)             a datum is wrong; nothing was computed
|   |-- MissingFieldError               a loss needs an input that the datum lacks
|   |-- LengthError                     a per-token input has another length than the targets
|   |-- IncompleteUnitError             half a pair, a pair of three, a group cut in two
|   `-- InvalidDatumsError              every problem of every datum of one call, together
|-- ShapeError (ValueError)             a tensor has another shape or dtype than asked for
|-- LossError (ValueError)              a loss is used wrongly
|   |-- UnknownLossError (LookupError)
|   |-- DuplicateLossError
|   |-- ConfigError                     a hyperparameter is unknown, misspelt or out of range
|   |-- BiasedGradientError             a combination known to optimise something else
|   |-- EmptyUnitError                  a sequence that needs a token has none
|   |-- MixedDenominatorsError          two denominators cannot be deferred together
|   `-- CustomLossError                 a user's function broke the contract
|       |-- LossTypeError (TypeError)   not a (scalar tensor, dict) pair
|       `-- NotDifferentiableError      no path from the log-probs to the loss
|-- BackendError (RuntimeError)         a backend refuses or fails
|   |-- PrecedingOperationFailed        the step would lack a batch that failed
|   |-- UnretrievedFailureError         closed while a failure had never been retrieved
|   |-- DoubleNormalizationError        the gradient would be divided twice
|   |-- NonFiniteError (ArithmeticError) NaN or inf in log-probs, cotangent or gradient
|   |-- LeakyModelError                 the model mixes sequences, or sees the future
|   |-- MissingReferenceError           there is no reference model to ask
|   |-- CheckpointError (OSError)       a checkpoint is missing, damaged or of another model
|   |-- UnsupportedError                the backend lacks this ability
|   |-- RankError                       an operation of several processes has failed in all of them
|   |   |-- RankFailedError             another process failed
|   |   |-- RanksDifferError            they were asked for, or given, different things
|   |   `-- LostRankError               another process has died or stalled
|   |-- RemoteError                     a service failed an operation, or could not be reached
|   `-- ClosedError                     used after close()
|-- ServiceError (RuntimeError)         the service was asked for what it does not have
|   |-- NotFoundError                   there is no such model, session, sampler or checkpoint of this key
|   |-- BusyError                       the service has too much to do; ask again later
|   |-- StorageError                    the service's disk is full, cannot be written, or holds what is damaged
|   `-- TooLargeError                   a request is over a limit of the service
`-- MissingExtraError (ImportError)     an optional dependency is not installed
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Sequence
from typing import Any, Final

from .deprecation import moved

_MOST_PROBLEMS: Final = 100  # that a message shows


class PullbackError(Exception):
    """Base of every error that pullback raises on purpose."""


class DatumError(PullbackError, ValueError):
    """A datum is wrong. Nothing was computed, no state changed."""


class MissingFieldError(DatumError):
    """A loss needs an input that a datum does not carry."""


class LengthError(DatumError):
    """A per-token input has another length than the target tokens."""


class IncompleteUnitError(DatumError):
    """A pair or group is not whole within one call."""


class InvalidDatumsError(DatumError):
    """Every problem of every datum of one call.

    Attributes:
        problems: one line per problem, in the order of the data.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        head = "1 problem" if count == 1 else f"{count} problems"
        shown = [f"  - {p}" for p in self.problems[:_MOST_PROBLEMS]]
        if count > _MOST_PROBLEMS:
            shown.append(f"  and {count - _MOST_PROBLEMS} more (all are in the error's .problems)")
        super().__init__(f"{head} in the data; nothing was computed:\n" + "\n".join(shown))


class ShapeError(PullbackError, ValueError):
    """A tensor has another shape or dtype than asked for."""


class LossError(PullbackError, ValueError):
    """A loss is used wrongly."""


class UnknownLossError(LossError, LookupError):
    """No loss of that name is registered."""


class DuplicateLossError(LossError):
    """The name is taken by another loss."""


class ConfigError(LossError):
    """A hyperparameter is unknown, misspelt or out of range."""


class BiasedGradientError(LossError):
    """A combination whose gradient is known to optimise something else."""


class EmptyUnitError(LossError):
    """A sequence that must have a trained token has none."""


class MixedDenominatorsError(LossError):
    """Terms with different denominators cannot share one deferred division."""


class CustomLossError(LossError):
    """A user's loss function broke the contract ``(data, logprobs) -> (loss, metrics)``."""


class LossTypeError(CustomLossError, TypeError):
    """The function did not return a scalar tensor and a dict."""


class NotDifferentiableError(CustomLossError):
    """The returned loss does not depend on any log-prob."""


class BackendError(PullbackError, RuntimeError):
    """A backend refuses or fails."""


class PrecedingOperationFailed(BackendError):
    """An earlier gradient operation failed, so the step would not be what was asked for."""


class UnretrievedFailureError(BackendError):
    """The backend was closed while the error of a failed operation had never been retrieved."""


class DoubleNormalizationError(BackendError):
    """The gradient would be divided twice."""


class NonFiniteError(BackendError, ArithmeticError):
    """NaN or inf where a finite number is needed."""


class LeakyModelError(BackendError):
    """The model lets one sequence, or the future, change another token's log-prob."""


class MissingReferenceError(BackendError):
    """There is no frozen reference model to score with."""


class CheckpointError(BackendError, OSError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class UnsupportedError(BackendError):
    """The backend lacks this ability."""


class RankError(BackendError):
    """An operation of several processes has failed in all of them."""


class RankFailedError(RankError):
    """It failed in another process, whose error the message repeats.

    Attributes:
        refusal: that error's words, where it refuses the data or the loss, which every process was given; None: that process
            has failed for reasons of its own.
    """

    def __init__(self, message: str, refusal: str | None = None) -> None:
        super().__init__(message)
        self.refusal = refusal


class RanksDifferError(RankError):
    """The processes have been asked for different things, or given different data."""


class LostRankError(RankError):
    """Another process has died or stalled. Every process must be started again."""


class RemoteError(BackendError):
    """A service failed an operation, or could not be reached.

    Attributes:
        category: ``user``: it was refused, and sending it again will not help; ``server``: it failed there. In both cases it
            had no effect. ``unknown``: there is no final answer, so it may have had.
    """

    def __init__(self, message: str, category: str = "unknown") -> None:
        super().__init__(message)
        self.category = category


class ClosedError(BackendError):
    """The backend was used after ``close()``."""


class ServiceError(PullbackError, RuntimeError):
    """The service was asked for a model or request that it does not have, or for the same number twice."""


class NotFoundError(ServiceError):
    """There is no model, session, sampling session or checkpoint of that name, or it belongs to another key."""


class BusyError(ServiceError):
    """The service has too much to do; the same request may be sent again later."""


class StorageError(ServiceError):
    """The disk of the service refuses: it is full or cannot be written, another server uses it, or its journal is damaged."""


class TooLargeError(ServiceError):
    """A request is over a limit of the service."""


class MissingExtraError(PullbackError, ImportError):
    """An optional dependency is not installed."""


def require_extra(module: str, extra: str, purpose: str) -> Any:
    """Import an optional module, or say which ``pip install`` brings it.

    Raises:
        MissingExtraError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(
            f"{purpose} needs {module!r}, which is not installed: pip install 'pullback[{extra}]'", name=module
        ) from error


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for a close spelling, else an empty string."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    if not close:
        return ""
    swapped = [
        each for each in close if sorted(each) == sorted(word)
    ]  # the commonest slip: two letters in the other order
    return f" (did you mean {(swapped or close)[0]!r}?)"


__getattr__ = moved(__name__, {"UnreadFailureError": ("errors", "UnretrievedFailureError")})
