"""A stub of the Kubeflow Pipelines API server, as strict as the real one wherever our client could get something wrong.

Requests are parsed with the models of kfp_server_api and with the IR's protobufs; unknown fields are refused. Every
refusal names the rule of the real server that it stands for: file and function in kubeflow/pipelines 2.17.0, below
backend/src/apiserver unless stated otherwise. Runs go through the states that a test gives them, and list the nodes of
their workflow as the real server does.
"""

import datetime
import json
import re
import ssl
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import kfp_server_api
import yaml
from google.protobuf import json_format
from kfp.kubernetes.kubernetes_executor_config_pb2 import KubernetesExecutorConfig
from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineSpec, PlatformSpec

from components.stages import STAGE_NAMES

WORKFLOW = "alignment-x8k2p"
POD_TEMPLATE = "metadata-0-2-retry-system-container-impl"
"""Template of a step with two labels, no annotation and retries: src/v2/compiler/argocompiler/container.go,
addContainerExecutorTemplate. A pod is named after workflow, template and hash: src/common/util/workflow.go,
RetrievePodName."""
CLIENT = kfp_server_api.ApiClient()
"""Created once: creating one takes logging's lock, which a signal in the main thread may interrupt and leave locked."""


class RefusalError(Exception):
    """An error response, and the rule of the real server that it stands for."""

    def __init__(self, status: int, message: str, rule: str) -> None:
        super().__init__(message)
        self.status, self.message, self.rule = status, message, rule


@dataclass
class Request:
    """A request as it arrived."""

    method: str
    path: str
    query: dict[str, str]
    authorization: str
    body: bytes


@dataclass
class Package:
    """An uploaded pipeline, parsed strictly."""

    spec: PipelineSpec
    platform: PlatformSpec
    executors: dict[str, KubernetesExecutorConfig]


@dataclass
class Run:
    """A run: the requested body, and the states that successive requests will see; the last one repeats."""

    body: Any
    states: list[str]
    failed: str = ""
    log: str = ""


@dataclass
class Fault:
    """A failure injected into the next matching requests."""

    method: str
    pattern: str
    times: int
    act: Callable[["Handler"], None]


def status(code: int, text: str = "", header: tuple[str, str] = ("Content-Type", "application/json")) -> Any:
    """A fault: this status, with this text or a gateway's JSON."""
    body = text or json.dumps({"error": "injected fault", "code": 13, "message": "injected fault"})
    return lambda handler: handler.answer(code, body.encode(), header)


def cut_off(handler: "Handler") -> None:
    """A fault: half of a JSON object, shorter than its Content-Length, and then the connection is closed."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"run_id": "')
    handler.close_connection = True


def closed(handler: "Handler") -> None:
    """A fault: the connection is closed without an answer."""
    handler.close_connection = True


def silent(handler: "Handler") -> None:
    """A fault: no answer until the test is over."""
    handler.server.kfp.over.wait(60)  # type: ignore[attr-defined]
    handler.close_connection = True


def _refused_by_a_gateway(handler: "Handler") -> None:
    handler.answer(404, f"Cannot {handler.command} {handler.path}".encode(), ("Content-Type", "text/plain"))


ABOUT_US: dict[str, Callable[["Handler"], None]] = {
    "an expired token": status(401),
    "no rights": status(403),
    "no rights at a proxy": status(403, "<html>RBAC: access denied"),
    "a proxy that wants a login": status(407, "<html>"),
    "a wrong route": status(404, "<html>404 page not found"),
    "a wrong route of the gateway": status(404, '{"code": 5, "message": "Not Found", "details": []}'),
    "a wrong route that echoes the path": _refused_by_a_gateway,
    "a server that fails": status(503),
    "a closed connection": closed,
    "a login page": status(200, "<html>log in"),
}
"""Answers that say something about the caller or the way to the server, and nothing about a run."""


def parse_strictly(data: Any, kind: str, where: str = "") -> Any:
    """A model of kfp_server_api from JSON values; unknown fields are refused."""
    rule = "common/utils.go, CustomMarshaler: DiscardUnknown is false, so an unknown field is an error"
    _refuse_unknown(data, kind, where or kind, rule)
    return CLIENT._ApiClient__deserialize(data, kind)  # type: ignore[attr-defined]


def _refuse_unknown(data: Any, kind: str, where: str, rule: str) -> None:
    inner = re.fullmatch(r"list\[(.*)\]|dict\(str, (.*)\)", kind)
    if inner:
        values = enumerate(data) if inner[1] else data.items()
        for key, value in values:
            _refuse_unknown(value, inner[1] or inner[2], f"{where}.{key}", rule)
        return
    model = getattr(kfp_server_api.models, kind, None)
    if model is None:
        return
    allowed = getattr(model, "allowable_values", None)
    if allowed is not None:
        if data not in allowed:
            raise RefusalError(400, f"{where}: {data!r} is not one of {allowed}", rule)
        return
    if not isinstance(data, dict):
        raise RefusalError(400, f"{where}: expected an object", rule)
    names = {json_name: name for name, json_name in model.attribute_map.items()}
    for key, value in data.items():
        if key not in names:
            raise RefusalError(400, f"{where}: unknown field {key}", rule)
        _refuse_unknown(value, model.openapi_types[names[key]], f"{where}.{key}", rule)


def parse_package(text: str) -> Package:
    """An IR file's documents as protobufs."""
    rule = "template/v2_template.go, NewV2SpecTemplate"
    specs, platforms = [], []
    for document in yaml.safe_load_all(text):
        kind = PlatformSpec() if "platforms" in document else PipelineSpec()
        try:
            json_format.ParseDict(document, kind)
        except json_format.ParseError as error:
            # The real server silently drops a platform that does not parse (IsPlatformSpecWithKubernetesConfig); here
            # it is refused.
            raise RefusalError(400, f"invalid v2 pipeline spec: {error}", rule) from error
        (platforms if isinstance(kind, PlatformSpec) else specs).append(kind)
    if len(specs) != 1 or len(platforms) > 1:
        raise RefusalError(400, "expected one pipeline spec and at most one platform spec", rule)
    spec = specs[0]
    name = spec.pipeline_info.name
    if (
        spec.schema_version != "2.1.0"
        or not re.search("[a-z0-9]([-a-z0-9]*[a-z0-9])?", name)
        or not spec.root.dag.tasks
    ):
        raise RefusalError(400, f"invalid v2 pipeline spec: version {spec.schema_version}, name {name!r}", rule)
    platform = platforms[0] if platforms else PlatformSpec()
    structs = platform.platforms["kubernetes"].deployment_spec.executors if platforms else {}
    executors = {}
    for executor, struct in structs.items():
        executors[executor] = json_format.ParseDict(json_format.MessageToDict(struct), KubernetesExecutorConfig())
    return Package(spec, platform, executors)


def check_parameters(package: Package, given: dict[str, Any]) -> None:
    """Refuse parameters of a run that the pipeline's root does not accept."""
    rule = "template/v2_template.go, validatePipelineJobInputs"
    kinds: dict[str, Any] = {
        "NUMBER_DOUBLE": int | float,
        "NUMBER_INTEGER": int | float,
        "STRING": str,
        "BOOLEAN": bool,
        "LIST": list,
        "STRUCT": dict,
    }
    known = package.spec.root.input_definitions.parameters
    for name, definition in known.items():
        kind = (
            definition.DESCRIPTOR.fields_by_name["parameter_type"]
            .enum_type.values_by_number[definition.parameter_type]
            .name
        )
        value = given.get(name)
        if name not in given:
            if not definition.is_optional and not definition.HasField("default_value"):
                raise RefusalError(400, f"parameter {name} is not optional, yet has neither default nor value", rule)
        elif not isinstance(value, kinds[kind]) or (kind.startswith("NUMBER") and isinstance(value, bool)):
            raise RefusalError(400, f"input parameter {name} requires type {kind}", rule)
    extra = sorted(given.keys() - set(known))
    if extra:
        raise RefusalError(400, f"parameter(s) provided are not required by pipeline: {', '.join(extra)}", rule)


class KfpServer:
    """The stub; a context manager.

    Args:
        token: the token that every request needs; empty for none.
        certificate: a PEM file with key and certificate for TLS; none for plain HTTP.
        multi_user: whether every request needs a namespace.
    """

    def __init__(self, token: str = "", certificate: Path | None = None, multi_user: bool = False) -> None:
        self.token = token
        self.multi_user = multi_user
        self.namespaces: list[str] = []
        """Namespaces that the token's owner may use; empty for all."""
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.pipelines: dict[str, dict[str, Any]] = {}
        self.versions: dict[str, dict[str, Any]] = {}
        self.packages: dict[str, Package] = {}
        self.experiments: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, Run] = {}
        self.recurring: dict[str, Any] = {}
        self.next_run = Run(None, ["PENDING"])
        """The states that the next started run goes through."""
        self.over = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads, self._http.block_on_close = True, False
        self._http.kfp = self  # type: ignore[attr-defined]
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        self.url = f"http{'s' if certificate else ''}://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "KfpServer":
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over.set()
        self._http.shutdown()
        self._http.server_close()

    def fail(self, method: str, pattern: str, act: Callable[["Handler"], None], times: int = 1000) -> None:
        """Inject a fault into the next matching requests."""
        self.faults.append(Fault(method, pattern, times, act))

    def add_run(self, *states: str, failed: str = "", log: str = "") -> str:
        """Add a run in progress; returns its id. `failed` names the step that fails, `log` is the log of its pod."""
        run_id = str(uuid.uuid4())
        self.runs[run_id] = Run(kfp_server_api.V2beta1Run(display_name="a run"), list(states), failed, log)
        return run_id

    def asked(self, method: str, pattern: str) -> list[Request]:
        """The matching requests so far."""
        return [item for item in self.requests if item.method == method and re.fullmatch(pattern, item.path)]

    # ---- the API
    def route(self, request: Request) -> Any:
        """The answer to a request, as JSON values or text."""
        self._authorise(request)
        api = "/apis/v2beta1"
        routes: list[tuple[str, str, Callable[..., Any]]] = [
            ("GET", f"{api}/healthz", lambda _: {"multi_user": True} if self.multi_user else {}),
            ("GET", f"{api}/pipelines", self._list_pipelines),
            ("POST", f"{api}/pipelines", self._create_pipeline),
            ("POST", f"{api}/pipelines/upload", self._upload_pipeline),
            ("POST", f"{api}/pipelines/upload_version", self._upload_version),
            ("GET", f"{api}/pipelines/([^/]+)/versions", self._list_versions),
            ("GET", f"{api}/experiments", self._list_experiments),
            ("POST", f"{api}/experiments", self._create_experiment),
            ("GET", f"{api}/runs", self._list_runs),
            ("POST", f"{api}/runs", self._create_run),
            ("GET", f"{api}/runs/([^/:]+)", self._get_run),
            ("POST", f"{api}/runs/([^/:]+):terminate", self._terminate),
            ("GET", f"{api}/recurringruns", self._list_recurring),
            ("POST", f"{api}/recurringruns", self._create_recurring),
            ("DELETE", f"{api}/recurringruns/([^/:]+)", self._delete_recurring),
            ("GET", "/k8s/pod/logs", self._log),
        ]
        for method, pattern, action in routes:
            match = re.fullmatch(pattern, request.path)
            if method == request.method and match:
                return action(request, *match.groups())
        raise RefusalError(404, "Not Found", "api/v2beta1/*.proto: paths of the HTTP annotations")

    def _authorise(self, request: Request) -> None:
        if self.token and request.authorization != f"Bearer {self.token}":
            rule = "auth/authenticator_token_review.go, doTokenReview"
            raise RefusalError(401, "Review.Status.Authenticated is false", rule)

    def _namespace(self, namespace: str) -> str:
        if not self.multi_user:
            return ""  # resource/resource_manager.go, ReplaceNamespace
        if not namespace:
            raise RefusalError(400, "Namespace cannot be empty", "resource/resource_manager.go, CreateExperiment")
        if self.namespaces and namespace not in self.namespaces:
            rule = "resource/resource_manager.go, IsAuthorized"
            raise RefusalError(403, "User 'a@example.com' is not authorized", rule)
        return namespace

    def _matching(self, request: Request, rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
        rule = "server/list_request_util.go, parseAPIFilter; filter/filter.go, toPredicate and toOperation"
        text = request.query.get("filter", "")
        if not text:
            return list(rows.values())
        try:
            (predicate,) = json.loads(text)["predicates"]
            operation, key, value = (predicate.pop(name) for name in ("operation", "key", "stringValue"))
        except (ValueError, KeyError) as error:
            raise RefusalError(400, f"failed to parse valid filter from {text!r}", rule) from error
        if predicate or operation not in ("EQUALS", 1) or key != "display_name":
            raise RefusalError(400, f"no support for this filter: {text}", rule)
        return [row for row in rows.values() if row[key] == value]

    def _list_pipelines(self, request: Request) -> dict[str, Any]:
        namespace = self._namespace(request.query.get("namespace", ""))
        return {"pipelines": [row for row in self._matching(request, self.pipelines) if row["namespace"] == namespace]}

    def _create_pipeline(self, request: Request) -> dict[str, Any]:
        new = parse_strictly(json.loads(request.body), "V2beta1Pipeline")
        return self._add_pipeline(new.name or new.display_name, self._namespace(new.namespace or ""), new.description)

    def _add_pipeline(self, name: str, namespace: str, description: str) -> dict[str, Any]:
        if not name or len(name) > 128:
            raise RefusalError(400, "pipeline's name cannot be empty", "resource/resource_manager.go, CreatePipeline")
        if any((row["name"], row["namespace"]) == (name, namespace) for row in self.pipelines.values()):
            rule = "storage/pipeline_store.go, CreatePipeline: NewAlreadyExistError"
            raise RefusalError(409, f"Failed to create a new pipeline. The name {name} already exist", rule)
        row = {"pipeline_id": str(uuid.uuid4()), "name": name, "display_name": name, "namespace": namespace}
        self.pipelines[row["pipeline_id"]] = row | {"description": description}
        return self.pipelines[row["pipeline_id"]]

    def _upload_pipeline(self, request: Request) -> dict[str, Any]:
        # server/pipeline_upload_server.go, uploadPipeline: creates a pipeline and a version of the same name
        package = self._uploaded(request)
        namespace = self._namespace(request.query.get("namespace", ""))
        row = self._add_pipeline(request.query.get("name", ""), namespace, request.query.get("description", ""))
        self._add_version(row["pipeline_id"], row["name"], package)
        return row

    def _upload_version(self, request: Request) -> dict[str, Any]:
        rule = "server/pipeline_upload_server.go, uploadPipelineVersion"
        package = self._uploaded(request)
        pipeline, name = request.query.get("pipelineid", ""), request.query.get("name", "")
        if pipeline not in self.pipelines:
            raise RefusalError(400, "Failed to create a pipeline version", rule)
        if not name or len(name) > 127:
            raise RefusalError(
                400, "PipelineVersion.Name length cannot exceed 127", "validation/length.go, LengthSpecs"
            )
        if any((row["pipeline_id"], row["name"]) == (pipeline, name) for row in self.versions.values()):
            raise RefusalError(409, "Failed to create a pipeline version", rule)
        return self._add_version(pipeline, name, package)

    def _add_version(self, pipeline: str, name: str, package: Package) -> dict[str, Any]:
        version = str(uuid.uuid4())
        self.packages[version] = package
        self.versions[version] = {"pipeline_id": pipeline, "pipeline_version_id": version} | {
            "name": name,
            "display_name": name,
        }
        return self.versions[version]

    def _uploaded(self, request: Request) -> Package:
        rule = "server/pipeline_upload_server.go, FormFileKey; server/util.go, ReadPipelineFile"
        for part in message_from_bytes(request.body).walk():
            if part.get_param("name", header="Content-Disposition") == "uploadfile":
                if not str(part.get_filename()).endswith((".yaml", ".yml")):
                    raise RefusalError(400, "Unexpected pipeline file format", rule)
                content = part.get_payload(decode=True)
                assert isinstance(content, bytes)
                return parse_package(content.decode())
        raise RefusalError(400, "Failed to read pipeline from file", rule)

    def _list_versions(self, request: Request, pipeline: str) -> dict[str, Any]:
        rows = self._matching(request, self.versions)
        return {"pipeline_versions": [row for row in rows if row["pipeline_id"] == pipeline]}

    def _list_experiments(self, request: Request) -> dict[str, Any]:
        namespace = self._namespace(request.query.get("namespace", ""))
        rows = self._matching(request, self.experiments)
        return {"experiments": [row for row in rows if row["namespace"] == namespace]}

    def _create_experiment(self, request: Request) -> dict[str, Any]:
        new = parse_strictly(json.loads(request.body), "V2beta1Experiment")
        name, namespace = new.display_name, self._namespace(new.namespace or "")
        if not name:
            raise RefusalError(
                500, "Experiment must have a non-empty name", "server/api_converter.go, toModelExperiment"
            )
        if any((row["display_name"], row["namespace"]) == (name, namespace) for row in self.experiments.values()):
            rule = "storage/experiment_store.go, CreateExperiment: NewAlreadyExistError"
            raise RefusalError(409, f"The name {name} already exists", rule)
        row = {"experiment_id": str(uuid.uuid4()), "display_name": name, "namespace": namespace}
        self.experiments[row["experiment_id"]] = row
        return row

    def _check_start(self, body: Any) -> None:
        """The checks that runs and recurring runs share."""
        if not body.display_name:
            raise RefusalError(
                400, "The run name is empty", "server/run_server.go, createRun; server/job_server.go, createJob"
            )
        if body.experiment_id not in self.experiments:
            rule = "resource/resource_manager.go, GetValidExperimentNamespacePair"
            raise RefusalError(404, f"experiment {body.experiment_id} not found", rule)
        reference = body.pipeline_version_reference
        version = self.versions.get((reference and reference.pipeline_version_id) or "")
        if not version or version["pipeline_id"] != reference.pipeline_id:
            rule = "resource/resource_manager.go, fetchTemplateFromPipelineSpec"
            raise RefusalError(500, "Failed to create a run due to error fetching manifest", rule)
        check_parameters(self.packages[version["pipeline_version_id"]], body.runtime_config.parameters or {})

    def _create_run(self, request: Request) -> dict[str, Any]:
        body = parse_strictly(json.loads(request.body), "V2beta1Run")
        self._check_start(body)
        run_id = str(uuid.uuid4())
        self.runs[run_id] = Run(body, list(self.next_run.states), self.next_run.failed, self.next_run.log)
        return {"run_id": run_id, "display_name": body.display_name, "state": "PENDING"}

    def _list_runs(self, request: Request) -> dict[str, Any]:
        self._namespace(request.query.get("namespace", ""))
        rows = {
            run_id: {"run_id": run_id, "display_name": run.body.display_name, "state": run.states[0]}
            for run_id, run in self.runs.items()
        }
        return {"runs": self._matching(request, rows)}

    def _run(self, run_id: str) -> Run:
        if run_id not in self.runs:
            raise RefusalError(404, f"Run {run_id} not found", "storage/run_store.go, GetRun: NewResourceNotFoundError")
        return self.runs[run_id]

    def _get_run(self, request: Request, run_id: str) -> dict[str, Any]:
        run = self._run(run_id)
        state = run.states.pop(0) if len(run.states) > 1 else run.states[0]
        answer = {"run_id": run_id, "display_name": run.body.display_name, "state": state}
        details = nodes(state, run.failed)
        return answer | ({"run_details": {"task_details": details}} if details else {})

    def _terminate(self, request: Request, run_id: str) -> dict[str, Any]:
        run = self._run(run_id)
        if run.states[0] not in ("PENDING", "RUNNING", "PAUSED"):
            raise RefusalError(
                400, f"Failed to terminate a run {run_id}. Row not found", "storage/run_store.go, TerminateRun"
            )
        run.states = ["CANCELING", "CANCELED"]
        return {}

    def _create_recurring(self, request: Request) -> dict[str, Any]:
        body = parse_strictly(json.loads(request.body), "V2beta1RecurringRun")
        rule = "server/api_converter.go, toModelJob"
        if not 1 <= int(body.max_concurrency or 0) <= 10:
            raise RefusalError(400, "Max concurrency of a recurring run must be at least 1 and at most 10", rule)
        if len(body.trigger.cron_schedule.cron.split()) != 6:
            # cron.Parse of robfig/cron v1 also accepts five fields, and reads the first as seconds
            raise RefusalError(400, "Schedule cron is not a supported format", rule)
        self._check_start(body)
        recurring_id = str(uuid.uuid4())
        self.recurring[recurring_id] = body
        body.created_at = f"{datetime.datetime(2026, 1, 1) + datetime.timedelta(seconds=len(self.requests))}Z"
        return {"recurring_run_id": recurring_id, "display_name": body.display_name}

    def _list_recurring(self, request: Request) -> dict[str, Any]:
        """Pages of two, whatever is asked for: page_size is only the most that a page may have."""
        self._namespace(request.query.get("namespace", ""))
        first = int(request.query.get("page_token", "") or 0)
        rows = [
            {
                "recurring_run_id": recurring_id,
                "display_name": body.display_name,
                "status": "ENABLED" if body.mode == "ENABLE" else "DISABLED",
                "trigger": {"cron_schedule": {"cron": body.trigger.cron_schedule.cron}},
                "pipeline_version_reference": body.pipeline_version_reference.to_dict(),
                "created_at": body.created_at,
            }
            for recurring_id, body in self.recurring.items()
        ]
        more = {"next_page_token": str(first + 2)} if len(rows) > first + 2 else {}
        return {"recurringRuns": rows[first : first + 2], "total_size": len(rows)} | more

    def _delete_recurring(self, request: Request, recurring_id: str) -> dict[str, Any]:
        if recurring_id not in self.recurring:
            rule = "storage/job_store.go, GetJob: NewResourceNotFoundError"
            raise RefusalError(404, f"Job {recurring_id} not found", rule)
        del self.recurring[recurring_id]
        return {}

    def _log(self, request: Request) -> str:
        rule = "frontend/server/handlers/pod-logs.ts, getPodLogsHandler"
        pod = request.query.get("podname", "")
        if not pod:
            raise RefusalError(400, "podname argument is required", rule)
        if self.multi_user and not request.query.get("podnamespace"):
            raise RefusalError(422, "podnamespace argument is required", rule)
        run = self._run(request.query.get("runid", ""))
        if pod != failed_pod():
            raise RefusalError(500, f"Could not get main container logs: pods {pod} not found", rule)
        return run.log


def failed_pod() -> str:
    """The pod of a failed step's last attempt."""
    return f"{WORKFLOW}-{POD_TEMPLATE}-2222222222"


def nodes(state: str, failed: str) -> list[dict[str, Any]]:
    """A run's task details as the server reports them: the nodes of its workflow, in no particular order.

    src/common/util/workflow.go, NodeStatuses; server/api_converter.go, toModelTask and toApiPipelineTaskDetail, which
    give names, states and the node ids of children, but neither a task's own pod nor its error.
    """
    if state == "PENDING":
        return []
    ended = state if state in ("SUCCEEDED", "FAILED") else "RUNNING"

    def node(name: str, node_state: str, *children: str) -> dict[str, Any]:
        task = {"task_id": str(uuid.uuid4()), "display_name": name, "state": node_state}
        return task | {"child_tasks": [{"pod_name": f"{WORKFLOW}-{child}"} for child in children]}

    details = [
        node("executor(0)", "FAILED"),
        node(WORKFLOW, ended, "1"),
        node("root", ended, "2"),
        node("root-driver", ended),
    ]
    last = STAGE_NAMES.index(failed or ("register" if state == "SUCCEEDED" else "sft"))
    for index, step in reversed(list(enumerate(STAGE_NAMES))):
        if index > last:
            details.append({"task_id": str(uuid.uuid4()), "display_name": step})  # omitted: an unpopulated state
        elif step == failed:
            details += [
                node("executor", "FAILED", "1111111111", "2222222222"),
                node("executor(1)", "FAILED"),
                node(step, "FAILED", "3333333333"),
                node(f"{step}-driver", "SUCCEEDED", "4"),
            ]
        else:
            step_state = "SUCCEEDED" if index < last or state == "SUCCEEDED" else "RUNNING"
            details += [
                node("executor", step_state, f"5{index}"),
                node("executor(0)", step_state, f"6{index}"),
                node(f"{step}-driver", "SUCCEEDED", f"7{index}"),
                node(step, step_state, f"8{index}"),
            ]
    return details


class Handler(BaseHTTPRequestHandler):
    """HTTP around `KfpServer.route`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Log nothing; the requests are recorded."""

    def answer(self, code: int, body: bytes, header: tuple[str, str] = ("Content-Type", "application/json")) -> None:
        """Send a complete response."""
        self.send_response(code)
        self.send_header(*header)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _serve(self) -> None:
        kfp: KfpServer = self.server.kfp  # type: ignore[attr-defined]
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get_content_type() == "multipart/form-data":
            body = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode() + body
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        request = Request(self.command, unquote(url.path), query, self.headers.get("Authorization", ""), body)
        kfp.requests.append(request)
        for fault in kfp.faults:
            if fault.times and fault.method == self.command and re.fullmatch(fault.pattern, request.path):
                fault.times -= 1
                fault.act(self)
                return
        try:
            answer = kfp.route(request)
        except RefusalError as error:
            details = {"error": error.message, "code": 3, "message": error.message}
            if "/upload" in request.path:  # server/pipeline_upload_server.go, writeErrorToResponse
                details = {"error_message": error.message, "error_details": error.message}
            self.answer(error.status, json.dumps(details).encode())
            return
        self.answer(200, answer.encode() if isinstance(answer, str) else json.dumps(answer).encode())

    def do_GET(self) -> None:
        """Serve a read."""
        self._serve()

    def do_DELETE(self) -> None:
        """Serve a removal."""
        self._serve()

    def do_POST(self) -> None:
        """Serve a write."""
        self._serve()
