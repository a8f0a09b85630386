"""The exceptions meant for people; messages say what was found, where, what was expected, and what to do.

Exception
└── KubealignError                 exit code 1, shown without a traceback
    ├── InputError                 a key, file, model or data set the user gave is wrong; exit code 2
    │   └── RowError               why a row cannot be a preference pair
    ├── DataValidationError        the data is too bad to train on
    ├── TrainingError              a non-finite loss, a wrong reference, out of memory
    ├── EvidenceError              a statement, history or cache that proves nothing
    ├── ChampionChangedError       another model became champion in the meantime
    ├── StepFailedError            a step of a local run failed; carries the step's exit code
    ├── InterruptedRunError        SIGINT or SIGTERM; exit code 128 + signal            (retryable)
    ├── RunPendingError            a run on Kubeflow may still reach a verdict          (retryable)
    │   └── WaitTimeoutError       it did not end within the time to wait
    └── ApiError                   a server refused, failed or did not answer           (retryable if it may pass)
        ├── KubeflowApiError       Kubeflow Pipelines
        ├── KubernetesApiError     Kubernetes
        └── RequestRejectedError   GitHub or a webhook said no; carries the HTTP status
"""

from collections.abc import Iterator


class KubealignError(Exception):
    """A failure that its message explains in full; it is shown without a traceback."""

    exit_code = 1
    retryable = False
    """Whether the same call or command may succeed later, with nothing changed by the user."""
    refusal = False
    """Whether the same inputs are bound to fail again, so that a cluster's retry of the step is of no use."""
    link = ""
    """URL of the run that it is about, if there is one."""


class InputError(KubealignError):
    """Something the user gave is wrong: a configuration key, a file, a model, a data set."""

    exit_code = 2
    refusal = True


class RowError(InputError):
    """Why a row cannot be a preference pair; never with the row's text."""


class DataValidationError(KubealignError):
    """The data is too bad to train on; the validation report says why."""

    refusal = True


class TrainingError(KubealignError):
    """Training cannot continue: a non-finite loss, a wrong reference model, or out of memory."""


class EvidenceError(KubealignError):
    """A signed statement, history or result is missing, foreign or changed, so nothing may rest on it."""


class ChampionChangedError(KubealignError):
    """The champion is not the one that the model was evaluated against."""


class StepFailedError(KubealignError):
    """A step of a local run failed; the message and the exit code are the step's own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class InterruptedRunError(KubealignError):
    """SIGINT or SIGTERM ended the command; running it again resumes the work."""

    retryable = True

    def __init__(self, signal_number: int, message: str = "interrupted; run the same command to resume") -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class RunPendingError(KubealignError):
    """A run on Kubeflow may still reach a verdict; the same command picks it up."""

    retryable = True


class WaitTimeoutError(RunPendingError):
    """A run on Kubeflow did not end within the time to wait; it is still running."""


class ApiError(KubealignError):
    """A server refused, failed or did not answer.

    Args:
        message: for a person.
        retryable: whether a later try may succeed.
    """

    def __init__(self, message: str, retryable: bool) -> None:
        super().__init__(message)
        self.retryable = retryable


class KubeflowApiError(ApiError):
    """Kubeflow Pipelines refused, failed or did not answer.

    Args:
        message: for a person.
        retryable: whether a later try may succeed.
        status: HTTP status code; 0 without an answer.
        answer: the server's own sentence; empty if the answer was not the API's.
    """

    def __init__(self, message: str, retryable: bool, status: int = 0, answer: str = "") -> None:
        super().__init__(message, retryable)
        self.status, self.answer = status, answer

    @property
    def about_caller(self) -> bool:
        """Whether it is about the caller, his rights or the way to the server, and so says nothing about a run."""
        return self.retryable or self.status in (401, 403, 404, 407)

    def is_gone(self, run_id: str) -> bool:
        """Whether the API itself said that there is no such run; a wrong route is a 404, too."""
        return self.status == 404 and run_id in self.answer


class KubernetesApiError(ApiError):
    """Kubernetes refused, failed or did not answer."""


class RequestRejectedError(ApiError):
    """GitHub or a webhook's receiver rejected a request.

    Args:
        message: for a person.
        status: HTTP status code.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message, retryable=False)
        self.status = status


def error_chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, then each one that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def single_line(text: str) -> str:
    """The text with every run of white space, line breaks included, replaced by one space."""
    return " ".join(text.split())
