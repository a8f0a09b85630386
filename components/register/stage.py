"""Put the judged model into the MLflow registry with its lineage, and move the aliases as the verdict says.

Never cached; run again it finds the version that it made before.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from components.common import tracking
from components.common.config import RegisterConfig
from components.common.errors import KubealignError
from components.common.files import digest, read_json, sha256_file, verify_manifest, write_json
from components.common.identity import versions
from components.resolve.stage import CHAMPION

CHALLENGER = "challenger"
CODE = Path(__file__).with_name("chat_model.py")


@dataclass(frozen=True)
class Lineage:
    """Where a model comes from; every field becomes a tag of its version."""

    data_commit: str
    preferences_digest: str
    instructions_digest: str
    git_commit: str
    base_reference: str
    base_digest: str
    config: str
    lineage: str
    incumbent: str


def run_register(
    config: RegisterConfig,
    lineage: Lineage,
    stage_runs: dict[str, str],
    policy: Path,
    evaluation: Path,
    report: Path,
    out: Path,
) -> dict[str, Any]:
    """Register a model.

    Args:
        config: the registered model's name, and whether a passed gate promotes.
        lineage: for the version's tags.
        stage_runs: MLflow run of every stage; a cached one belongs to an earlier pipeline run.
        policy: folder from dpo.
        evaluation: folder from evaluate, with the verdict on that very policy.
        report: the HTML report.
        out: JSON file that gets the result.

    Returns:
        the result: version, aliases, verdict, metrics, lineage, and seconds and memory per stage.

    Raises:
        KubealignError: the verdict is about another model, or a file changed since it was written.
    """
    with tracking.stage_run("register", config.model_dump() | asdict(lineage)) as run:
        policy_digest = verify_manifest(policy)
        verdict = read_json(evaluation / "verdict.json")
        if verdict["policy_digest"] != policy_digest:
            judged = verdict["policy_digest"][:12]
            raise KubealignError(f"the verdict is about policy {judged}, this is {policy_digest[:12]}; evaluate it")
        files = read_json(policy / "manifest.json")
        weights = {name: value for name, value in files.items() if name.startswith(("model/", "adapter/"))}
        model_digest = digest([weights, sha256_file(CODE)])
        tags = {f"kubealign.{key}": value for key, value in asdict(lineage).items()} | {
            "kubealign.base_content": read_json(policy / "training.json")["base_digest"],
            "kubealign.model": model_digest,
            "kubealign.verdict": verdict["verdict"],
        }
        version = _existing(run.client, config.name, model_digest)
        if version:
            # The same weights, judged anew: the tags tell of the newest judgement, and still which run made them.
            run.say(f"these weights are {config.name} version {version} already")
            for key, value in tags.items():
                run.client.set_model_version_tag(config.name, version, key, value)
        else:
            made_by = {"kubealign.run": tracking.parent_run() or run.run_id}
            version = _log_model(run, config.name, policy, tags | made_by)
        _move_aliases(run, config, version, verdict, lineage.incumbent)
        aliases = sorted(run.client.get_model_version(config.name, version).aliases)
        found = read_json(evaluation / "evaluation.json")
        result = {
            "run_id": tracking.parent_run() or run.run_id,
            "model": config.name,
            "version": version,
            "model_uri": f"models:/{config.name}/{version}",
            "aliases": aliases,
            "promote": config.promote,
            "verdict": {key: verdict[key] for key in ("passed", "verdict", "sentence", "incumbent", "rules")},
            **asdict(lineage),
            "metrics": {name: values["overall"] for name, values in found["models"].items()},
            "languages": {name: values["languages"] for name, values in found["models"].items()},
            "comparisons": found["comparisons"],
            "own": found["own"],
            "stages": _stages(run.client, stage_runs),
        }
        write_json(out, result)
        _tell_parent(run, result, stage_runs, report)
        run.say(f"{config.name} version {version}: {', '.join(aliases) or 'no alias'}")
        return result


def _existing(client: Any, name: str, model_digest: str) -> str:
    # A server with users answers 403 when asked for a model that is not there; a search is let through.
    if not client.search_registered_models(f"name = '{name}'"):
        return ""
    query = f"name = '{name}' AND tags.`kubealign.model` = '{model_digest}'"
    versions = sorted((int(found.version) for found in client.search_model_versions(query)), reverse=True)
    return str(versions[0]) if versions else ""


def _log_model(run: tracking.StageRun, name: str, policy: Path, tags: dict[str, str]) -> str:
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, Object, ParamSchema, ParamSpec, Property, Schema

    message = Object([Property("role", DataType.string), Property("content", DataType.string)])
    signature = ModelSignature(
        inputs=Schema([ColSpec(Array(message), "messages")]),
        outputs=Schema([ColSpec(DataType.string)]),
        params=ParamSchema(
            [
                ParamSpec("max_new_tokens", DataType.long, 256),
                ParamSpec("temperature", DataType.double, 0.0),
                ParamSpec("seed", DataType.long, 0),
            ]
        ),
    )
    with mlflow.start_run(run_id=run.run_id):
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(CODE),
            artifacts={kind: str(policy / kind) for kind in ("model", "adapter") if (policy / kind).is_dir()},
            signature=signature,
            pip_requirements=_requirements(policy),
        )
    try:
        run.client.create_registered_model(name)
    except mlflow.exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    made = run.client.create_model_version(
        name, logged.model_uri, run_id=run.run_id, tags=tags, model_id=logged.model_id
    )
    return str(made.version)


def _requirements(policy: Path) -> list[str]:
    """What an environment needs to load the registered model; this project is not among it."""
    wanted = {"mlflow": versions(["mlflow-skinny"])["mlflow-skinny"], **versions(["pandas"])}
    wanted |= read_json(policy / "training.json")["libraries"]
    return [f"{name}=={version}" for name, version in wanted.items()]


def _move_aliases(
    run: tracking.StageRun, config: RegisterConfig, version: str, verdict: dict[str, Any], incumbent: str
) -> None:
    """The version becomes challenger, and champion if it passed against the champion that there is now."""
    if CHAMPION in run.client.get_model_version(config.name, version).aliases:
        return
    run.client.set_registered_model_alias(config.name, CHALLENGER, version)
    if not (verdict["passed"] and config.promote):
        return
    champion = run.client.get_registered_model(config.name).aliases.get(CHAMPION)
    if champion and str(champion) != incumbent.rpartition("/")[2]:
        run.say(
            f"not promoted: version {champion} became champion meanwhile, and this one was judged against"
            f" {incumbent or 'the SFT model'}; run again"
        )
        return
    run.client.set_registered_model_alias(config.name, CHAMPION, version)


def _stages(client: Any, stage_runs: dict[str, str]) -> dict[str, Any]:
    stages = {}
    for stage, run_id in stage_runs.items():
        found = client.get_run(run_id)
        stages[stage] = {
            "run_id": run_id,
            "cached": found.data.tags.get("mlflow.parentRunId", "") != tracking.parent_run(),
            "seconds": found.data.metrics.get("seconds"),
            "peak_memory_mib": found.data.metrics.get("peak_memory_mib"),
        }
    return stages


def _tell_parent(run: tracking.StageRun, result: dict[str, Any], stage_runs: dict[str, str], report: Path) -> None:
    """Let the parent run carry result and report, and name the original run of every cached stage."""
    parent = tracking.parent_run() or run.run_id
    run.client.log_dict(parent, result, "result.json")
    run.client.log_text(parent, report.read_text(encoding="utf-8"), "report.html")
    for stage, found in result["stages"].items():
        if found["cached"]:
            run.client.set_tag(parent, f"kubealign.cached.{stage}", stage_runs[stage])
    tags = {"version": result["model_uri"], "verdict": result["verdict"]["verdict"], "lineage": result["lineage"]}
    for key, value in tags.items():
        run.client.set_tag(parent, f"kubealign.{key}", value)
