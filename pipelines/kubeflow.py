"""A client for Kubeflow Pipelines: upload a version, start a run, follow it to its end, cancel it, schedule it.

`KFP_ENDPOINT` is the server's address. The token comes from the file in KFP_TOKEN_FILE (re-read for every request),
from KFP_TOKEN, or from the service account's projected token in a pod; it is never passed on a command line. A server
whose certificate is signed by your own CA needs KFP_CA_FILE; verification cannot be switched off.
"""

import contextlib
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from components.common.errors import InputError, KubeflowApiError, RunPendingError, WaitTimeoutError, single_line
from components.common.files import sha256_file
from components.common.provenance import git_commit
from components.common.secrets import without_credentials, without_query
from components.config.cluster import ClusterConfig
from components.config.params import Config, pipeline_arguments
from components.stages import STAGE_NAMES
from pipelines.alignment import DESCRIPTION, NAME, compile_pipeline
from pipelines.platform import for_its_hardware, pod_template

ENDPOINT, TOKEN, TOKEN_FILE, CA_FILE = "KFP_ENDPOINT", "KFP_TOKEN", "KFP_TOKEN_FILE", "KFP_CA_FILE"
SERVICE_ACCOUNT_TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")
"""Conventional path of a pod's projected token for the audience pipelines.kubeflow.org."""
ENDED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
POLL_S = 10.0
RETRY_TIMEOUT_S = 600.0
"""Default time for which `wait` keeps retrying while the server does not answer."""
REFUSALS = 3
"""Refusals in a row of a request about a run before `wait` ends: a token may be renewed at that very moment."""
ANSWER_S = 60.0
"""Connect and read timeout of a request; KFP's client would wait forever."""
LOG_LINES = 20


@dataclass(frozen=True)
class Step:
    """The state of a step of a run, as the server reports it."""

    name: str
    state: str
    error: str
    pods: tuple[str, ...]
    """Pods that may hold the log of a failed step, the most likely first."""


@dataclass(frozen=True)
class RunState:
    """The state of a run, as the server reports it."""

    run_id: str
    name: str
    state: str
    error: str
    steps: list[Step]


@dataclass(frozen=True)
class Schedule:
    """A recurring run of this pipeline, as the server reports it."""

    recurring_id: str
    name: str
    cron: str
    enabled: bool
    created: str
    """When it was made: UTC, ISO 8601."""
    version: str
    """Name of the pipeline version that it runs."""


class Server:
    """A Kubeflow Pipelines server."""

    def __init__(self, cluster: ClusterConfig) -> None:
        self.endpoint = os.environ.get(ENDPOINT, "").rstrip("/")
        shown = without_query(self.endpoint) or "(not set)"
        if not self.endpoint.startswith(("http://", "https://")):
            raise InputError(
                f"{ENDPOINT}={shown}: expected the address of Kubeflow Pipelines, such as"
                " https://kubeflow.example.com/pipeline or http://127.0.0.1:8080 behind kubectl port-forward"
            )
        if shown != self.endpoint:
            raise InputError(f"{ENDPOINT}={shown}: a user or token in a URL would reach logs; set {TOKEN_FILE}")
        authority = os.environ.get(CA_FILE) or None
        if authority and not Path(authority).is_file():
            raise InputError(f"{CA_FILE}={authority}: no such file")
        self.cluster = cluster
        self.namespace = cluster.namespace or None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.client = _client_class()(
                host=self.endpoint,
                namespace=cluster.namespace,
                credentials=_credentials(),
                ssl_ca_cert=authority,
                verify_ssl=True,
            )
        rest = self.client._run_api.api_client.rest_client
        rest.request = _guarded(rest.request)

    def upload(self, package: Path, version: str) -> tuple[str, str]:
        """Upload the pipeline as a version, unless the server has it; returns the ids of pipeline and version."""
        client, pipeline = self.client, self._pipeline()
        if not pipeline:  # created without a version: one uploaded here would be named `alignment`, too
            from kfp_server_api import V2beta1Pipeline

            new = V2beta1Pipeline(name=NAME, display_name=NAME, description=DESCRIPTION, namespace=self.namespace)
            pipeline = str(self._ask(lambda: client.pipelines.pipeline_service_create_pipeline(new)).pipeline_id)
        versions = self._ask(
            lambda: client.list_pipeline_versions(pipeline, filter=_name_filter(version))
        ).pipeline_versions
        if not versions:
            versions = [self._ask(lambda: client.upload_pipeline_version(str(package), version, pipeline))]
        return pipeline, str(versions[0].pipeline_version_id)

    def experiment(self) -> str:
        """Id of the configured experiment, which is created if it does not exist."""
        experiment = self._ask(lambda: self.client.create_experiment(self.cluster.experiment, namespace=self.namespace))
        return str(experiment.experiment_id)

    def start(self, name: str, version: tuple[str, str], parameters: dict[str, Any]) -> str:
        """Start a run; returns its id."""
        experiment = self.experiment()
        started = self._ask(
            lambda: self.client.run_pipeline(
                experiment,
                name,
                params=parameters,
                pipeline_id=version[0],
                version_id=version[1],
                service_account=self.cluster.service_account or None,
            )
        )
        return str(started.run_id)

    def active_runs(self, name: str) -> list[str]:
        """Ids of the runs with this name that have not ended."""
        query = _name_filter(name)
        page = self._ask(lambda: self.client.list_runs(filter=query, namespace=self.namespace, page_size=100))
        return [str(run.run_id) for run in page.runs or [] if str(run.state) not in ENDED]

    def schedule(self, name: str, version: tuple[str, str], parameters: dict[str, Any], cron: str) -> str:
        """Schedule runs by a cron expression with six fields, seconds first; returns the recurring run's id."""
        experiment = self.experiment()
        recurring = self._ask(
            lambda: self.client.create_recurring_run(
                experiment,
                name,
                cron_expression=cron,
                max_concurrency=1,
                no_catchup=True,
                params=parameters,
                pipeline_id=version[0],
                version_id=version[1],
                service_account=self.cluster.service_account or None,
            )
        )
        return str(recurring.recurring_run_id)

    def schedules(self) -> list[Schedule]:
        """The recurring runs of this pipeline, by name, the newest of a name first; those of others are left out."""
        pipeline = self._pipeline()
        if not pipeline:
            return []
        client = self.client
        versions = self._pages(
            lambda token: client.list_pipeline_versions(pipeline, page_token=token, page_size=100), "pipeline_versions"
        )
        names = {version.pipeline_version_id: str(version.display_name) for version in versions}
        found = self._pages(
            lambda token: client.list_recurring_runs(page_token=token, page_size=100, namespace=self.namespace),
            "recurring_runs",
        )
        made = [
            Schedule(
                str(one.recurring_run_id),
                str(one.display_name),
                str((one.trigger and one.trigger.cron_schedule and one.trigger.cron_schedule.cron) or ""),
                str(one.status) == "ENABLED",
                one.created_at.isoformat() if one.created_at else "",
                names.get(one.pipeline_version_reference.pipeline_version_id, ""),
            )
            for one in found
            if one.pipeline_version_reference and one.pipeline_version_reference.pipeline_id == pipeline
        ]
        made.sort(key=lambda one: (one.created, one.recurring_id), reverse=True)
        return sorted(made, key=lambda one: one.name)

    def unschedule(self, recurring_id: str) -> None:
        """Delete a recurring run; one that is gone already is no error."""
        try:
            self._ask(lambda: self.client.delete_recurring_run(recurring_id))
        except KubeflowApiError as error:
            if not error.is_gone(recurring_id):
                raise

    def state(self, run_id: str) -> RunState:
        """The current state of a run."""
        run = self._ask(lambda: self.client.get_run(run_id))
        details = (run.run_details and run.run_details.task_details) or []
        steps = _steps(details, pod_template(self.cluster))
        error = (run.error and run.error.message) or ""
        return RunState(run_id, str(run.display_name), str(run.state or "PENDING"), single_line(error), steps)

    def wait(
        self, run_id: str, on_change: Callable[[RunState], None], timeout_s: float, retry_timeout_s: float | None = None
    ) -> RunState:
        """Poll a run until it has ended; KFP's own wait never returns for a canceled one.

        Args:
            run_id: the run.
            on_change: called with every state that differs from the previous one.
            timeout_s: maximum time to wait, in seconds.
            retry_timeout_s: seconds for which to keep retrying while the server does not answer; `RETRY_TIMEOUT_S` by
                default.

        Raises:
            WaitTimeoutError: the run is still running after `timeout_s`.
            RunPendingError: the server has not answered for `retry_timeout_s`, or does not tell us about the run.
            KubeflowApiError: there is no such run.
        """
        retry_timeout_s = RETRY_TIMEOUT_S if retry_timeout_s is None else retry_timeout_s
        started = answered = time.monotonic()
        last: RunState | None = None
        refused = 0
        while True:
            try:
                now = self.state(run_id)
                answered, refused = time.monotonic(), 0
            except KubeflowApiError as error:
                if error.is_gone(run_id):
                    raise
                now_s = time.monotonic()
                refused = 0 if error.retryable else refused + 1
                if refused >= REFUSALS or now_s - answered > retry_timeout_s or now_s - started > timeout_s:
                    seen = f"{last.state} when last seen" if last and last.name else "not seen"
                    raise RunPendingError(
                        f"{error}; that says nothing about run {run_id} ({seen}, {self.link(run_id)}): follow it with"
                        f" `kubealign wait {run_id}`"
                    ) from error
                now = last or RunState(run_id, "", "PENDING", "", [])
            if now != last:
                on_change(now)
                last = now
            if now.state in ENDED:
                return now
            if time.monotonic() - started > timeout_s:
                raise WaitTimeoutError(
                    f"run {run_id} is {now.state} after {timeout_s:.0f} s: still running;"
                    f" follow it with `kubealign wait {run_id}`"
                )
            time.sleep(min(POLL_S, max(0.0, started + timeout_s - time.monotonic())))

    def cancel(self, run_id: str) -> None:
        """Cancel a run."""
        self._ask(lambda: self.client.terminate_run(run_id))

    def link(self, run_id: str) -> str:
        """The URL of a run in the Kubeflow UI."""
        return f"{self.endpoint}/#/runs/details/{run_id}"

    def log_tail(self, run_id: str, step: Step) -> list[str]:
        """The last lines of a step's log from the UI's server, or a hint where else to look if it has none."""
        for pod in step.pods:
            query = {"podname": pod, "runid": run_id} | ({"podnamespace": self.namespace} if self.namespace else {})
            request = urllib.request.Request(f"{self.endpoint}/k8s/pod/logs?{urllib.parse.urlencode(query)}")  # noqa: S310
            try:
                key = self.client._existing_config.get_api_key_with_prefix("authorization")
                if key:
                    request.add_unredirected_header("Authorization", key)
                with urllib.request.urlopen(request, timeout=ANSWER_S, context=_tls(self.endpoint)) as answer:  # noqa: S310
                    text: str = answer.read().decode(errors="replace")
            except (OSError, ValueError, http.client.HTTPException, KubeflowApiError):
                continue
            if text.strip():
                return text.splitlines()[-LOG_LINES:]
        labels = f"pipeline/runid={run_id},app.kubernetes.io/component={step.name}"
        return [f"(no log here; `kubectl logs -n {self.namespace or 'kubeflow'} -l {labels} -c main` may have it)"]

    def _pipeline(self) -> str:
        """Id of the pipeline; empty before its first upload."""
        query = _name_filter(NAME)
        found = self._ask(lambda: self.client.list_pipelines(filter=query, namespace=self.namespace)).pipelines
        return str(found[0].pipeline_id) if found else ""

    def _pages(self, ask: Callable[[str], Any], rows: str) -> list[Any]:
        """All rows of a list that comes in pages; `ask` takes the token of a page."""
        found: list[Any] = []
        token = ""
        while True:
            page = self._ask(partial(ask, token))
            found += getattr(page, rows) or []
            token = page.next_page_token or ""
            if not token:
                return found

    def _ask(self, call: Callable[[], Any]) -> Any:
        """Call the client with its own output suppressed; a failure becomes a `KubeflowApiError` of one sentence."""
        import urllib3
        from kfp_server_api.exceptions import ApiException

        with _api_errors(self.endpoint, ApiException, urllib3.exceptions.HTTPError), _quiet():
            return call()


@contextlib.contextmanager
def _api_errors(endpoint: str, api: type[Exception], http: type[Exception]) -> Iterator[None]:
    """Turn failures of KFP's client into `KubeflowApiError`; exception types are arguments to defer imports."""
    try:
        yield
    except api as error:
        status = int(getattr(error, "status", 0) or 0)
        message = _message(getattr(error, "body", "") or getattr(error, "reason", "") or "")
        advice = {
            401: f"; set {TOKEN_FILE} or {TOKEN}",
            403: "; the token's owner is not allowed to do this in this namespace (cluster.namespace)",
            404: "; check the id and KFP_ENDPOINT",
        }.get(status, "")
        raise KubeflowApiError(
            f"{endpoint} answered {status}: {message}{advice}",
            retryable=status >= 500 or status in (408, 425, 429),
            status=status,
            answer=message if _is_json(getattr(error, "body", "")) else "",
        ) from error
    except (http, OSError) as error:
        text = without_credentials(single_line(str(error)))[:300]
        raise KubeflowApiError(f"{endpoint} does not answer: {text}", True) from error
    except ValueError as error:  # the client raises it for an answer that is not JSON or lacks a field
        raise KubeflowApiError(
            f"{endpoint} gave an answer that cannot be read: {without_credentials(single_line(str(error)))[:300]}", True
        ) from error


def _name_filter(name: str) -> str:
    """The API's filter for a display name."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})


def _message(body: Any) -> str:
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body)
    try:
        answer = json.loads(text)
        text = str(answer.get("message") or answer.get("error_message") or answer.get("error") or text)
    except (ValueError, AttributeError):
        pass
    return without_credentials(single_line(text))[:300]


def _is_json(body: Any) -> bool:
    try:
        return isinstance(json.loads(body or ""), dict)
    except ValueError:
        return False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the output of KFP's client: the links that it prints need not be reachable from here."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _client_class() -> Any:
    import kfp

    class Client(kfp.Client):  # type: ignore[misc]
        """KFP's client without its health check, which retries an unreachable server five times, with tracebacks."""

        def get_kfp_healthz(self, sleep_duration: int = 5) -> Any:
            """Skip the request: it only serves to choose a namespace, and that is cluster.namespace."""
            from kfp_server_api import V2beta1GetHealthzResponse

            return V2beta1GetHealthzResponse(multi_user=False)

    return Client


def _guarded(request: Callable[..., Any]) -> Callable[..., Any]:
    """The client's HTTP call with a timeout, which rejects answers that are not JSON objects, such as a login page.

    The client itself would parse such a page as an object without fields.
    """

    def guarded(*args: Any, **kwargs: Any) -> Any:
        reply = request(*args, **kwargs | {"_request_timeout": (ANSWER_S, ANSWER_S)})
        text = reply.data.decode(errors="replace")
        try:
            is_object = isinstance(json.loads(text), dict)
        except ValueError:
            is_object = False
        if not is_object:
            raise ValueError(f"expected JSON, found {single_line(text)[:60]!r}; check {ENDPOINT} and the token")
        return reply

    return guarded


def _credentials() -> Any:
    from kfp.client.token_credentials_base import TokenCredentialsBase

    file = Path(os.environ[TOKEN_FILE]) if os.environ.get(TOKEN_FILE) else None
    token = os.environ.get(TOKEN, "")
    if file is None and not token and SERVICE_ACCOUNT_TOKEN.is_file():
        file = SERVICE_ACCOUNT_TOKEN
    if file is None and not token:
        return None
    if file is not None and not file.is_file():
        raise InputError(f"{TOKEN_FILE}={file}: no such file")

    class Token(TokenCredentialsBase):  # type: ignore[misc]
        """The current token: a projected one is rotated while a run is followed."""

        def refresh_api_key_hook(self, config: Any) -> None:
            config.api_key["authorization"] = _token(file, token)
            config.api_key_prefix["authorization"] = "Bearer"

    return Token()


def _token(file: Path | None, token: str) -> str:
    """The token to send, checked here because Python's error about an invalid header would show it in full."""
    where = f"{TOKEN_FILE}={file}" if file else TOKEN
    try:
        text = (file.read_text(encoding="utf-8", errors="replace") if file else token).strip()
    except OSError as error:
        raise KubeflowApiError(f"{where}: {error.strerror}; expected a token", True) from error
    if not text or not text.isascii() or not text.isprintable():
        found = "nothing" if not text else "line breaks or non-ASCII characters"
        raise KubeflowApiError(f"{where}: expected a token in one line of ASCII, found {found}", True)
    return text


def _tls(endpoint: str) -> Any:
    import ssl

    return ssl.create_default_context(cafile=os.environ.get(CA_FILE) or None) if endpoint[:5] == "https" else None


def _steps(details: list[Any], template: str) -> list[Step]:
    """The pipeline's steps that have started, in pipeline order.

    The server lists the nodes of the Argo workflow, in no particular order: the workflow, root, and for a step its
    driver, itself, and `executor`; if it may be retried, `executor(0)` and so on as children of that. Children are
    named by node id, `<workflow>-<hash>`; a pod's name has the template's name in between (kubeflow/pipelines 2.17,
    workflow.go, RetrievePodName), unless Argo runs with POD_NAMES=v1. Steps run one by one, so at most one fails.
    """
    attempts = [_children(task) for task in details if task.display_name == "executor" and task.state == "FAILED"]
    started = {task.display_name: task for task in details if task.state not in (None, "RUNTIME_STATE_UNSPECIFIED")}
    steps = []
    for name in (stage for stage in STAGE_NAMES if stage in started):
        task = started[name]
        error = (task.error and task.error.message) or ""
        nodes = [node for children in [*attempts, _children(task)] for node in reversed(children)]
        pods = [pod for node in nodes for pod in (_pod(node, template), node)]
        steps.append(Step(name, str(task.state), single_line(error), tuple(pods) if task.state == "FAILED" else ()))
    return steps


def _pod(node: str, template: str) -> str:
    workflow, _, node_hash = node.rpartition("-")
    return f"{workflow}-{template}-{node_hash}"


def _children(task: Any) -> list[str]:
    return [child.pod_name for child in task.child_tasks or [] if child.pod_name]


def submit(
    config: Config, server: Server, cron: str = "", name: str = "", caching: bool = True, project_commit: str = ""
) -> tuple[str, str]:
    """Upload this commit's pipeline and start it with the configuration's values, or schedule it.

    The version's name contains the git commit and a hash of the compiled pipeline, since cluster settings may change
    without a commit.

    Args:
        config: the whole configuration.
        server: the Kubeflow Pipelines server.
        cron: cron expression with six fields; empty to run once, now.
        name: the run's name; by default built from the data's revision and the version.
        caching: whether steps may be served from the cache. It is compiled in, since KFP's client drops it from the
            request for a run of an uploaded version (kfp 2.17, _create_job_config).
        project_commit: as in `pipeline_arguments`.

    Returns:
        id of the run, or of the recurring run; and the version's name.
    """
    with TemporaryDirectory() as folder:
        package = Path(folder) / "alignment.yaml"
        compile_pipeline(config, package, "kubeflow", caching)
        commit = git_commit()
        version = f"{commit[:12]}{'-dirty' if commit.endswith('-dirty') else ''}-{sha256_file(package)[:8]}"
        ids = server.upload(package, version)
    name = name or f"{NAME} {config.data.revision} {version}"
    parameters = pipeline_arguments(for_its_hardware(config, "kubeflow"), project_commit)
    if cron:
        return server.schedule(name, ids, parameters, cron), version
    return server.start(name, ids, parameters), version
