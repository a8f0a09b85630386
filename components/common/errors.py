"""The exceptions that a person is meant to read: what was found, where, what was expected, what to do."""


class KubealignError(Exception):
    """A failure that its message explains in full; it is shown without a traceback."""

    exit_code = 1


class InputError(KubealignError):
    """Something the user gave is wrong: a configuration key, a file, a model, a data set."""

    exit_code = 2


class DataStop(KubealignError):
    """The data is too bad to train on; validation says why."""


class TrainingStop(KubealignError):
    """Training cannot go on: a loss that is not finite, a reference that is not the right one."""
