"""Every error this package raises on purpose, in one tree.

A message says what happened, with which value, what is valid, and what to do next. Errors that are a user's mistake
also derive from the builtin that Python users would catch (ValueError, TypeError, ImportError).
"""

from __future__ import annotations


class CerebroError(Exception):
    """Base of all errors raised on purpose."""


class ConfigurationError(CerebroError, ValueError):
    """An argument has a value that cannot work."""


class NotPicklableError(CerebroError, TypeError):
    """Something that must travel to a worker process cannot be pickled."""


class NotTrainableError(CerebroError, TypeError):
    """The object given is none of the things that can be trained."""


class MissingHostError(CerebroError, ImportError):
    """A package that an integration works with is not installed."""


class UnknownMetricError(CerebroError, ValueError):
    """The metric asked for is in no report."""


class DataError(CerebroError, ValueError):
    """A data source or a sharded data set is not usable."""


class DamagedShardError(DataError):
    """A shard's bytes are not those that were written."""


class RowError(DataError):
    """A row of the user's Dataset cannot be read, or rows cannot be put together into a batch."""


class LoaderError(DataError):
    """A loader process died."""


class StateError(CerebroError):
    """A trial's state cannot be carried, stored or read."""


class UnsupportedLeafError(StateError, TypeError):
    """A leaf of the state tree is of a kind that cannot be carried between workers; the message has its key path."""


class DamagedStateError(StateError):
    """A stored state's bytes are not those that were written."""


class StateMemoryError(StateError, MemoryError):
    """There is no memory left for the states of the live trials."""


class StateTooLargeError(StateMemoryError):
    """One trial's state is larger than the memory for all of them: it fails, and the others need not."""


class DamagedJournalError(CerebroError):
    """The bytes of a run's journal are not those that were written."""


class RunBusyError(CerebroError, RuntimeError):
    """Another process has the run's folder in its hands."""


class TrialFailedError(CerebroError, RuntimeError):
    """A trial that somebody waited for has failed; the message has its traceback."""


class WorkerError(CerebroError):
    """A worker could not be started, or broke in a way that no retry can mend."""


class IllegalEventError(CerebroError):
    """The state machine was given an event that its table does not allow; nothing was changed."""


class InvariantError(CerebroError, AssertionError):
    """An invariant of the state machine does not hold: a defect of this package."""


class NonFiniteLossError(CerebroError, ArithmeticError):
    """The training loss of a unit is NaN or infinite."""
