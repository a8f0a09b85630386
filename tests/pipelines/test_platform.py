"""What the section `cluster` becomes in the compiled pipeline, compared with a golden file.

`RENEW_GOLDEN=1 pytest tests/pipelines/test_platform.py -k golden` writes tests/pipelines/golden_cluster.yaml anew; read
its diff before you commit it. It has what comes from the section and nothing else, for one step of each image: no
other setting, signature or source text moves it.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.common.errors import InputError
from components.common.images import DATA_IMAGE, TRAIN_IMAGE
from components.config.cluster import ClusterConfig
from components.config.params import load_config, pipeline_arguments
from components.stages import BY_NAME, STAGE_NAMES
from pipelines.alignment import compile_pipeline
from pipelines.platform import for_its_hardware, pod_template
from tests.conftest import ROOT
from tests.stubs.kfp_server import POD_TEMPLATE, parse_package

PARAMS = ROOT / "params.yaml"
GOLDEN = Path(__file__).with_name("golden_cluster.yaml")
REMOTE = ["data.repo=https://git.example.com/alignment.git", "data.revision=v1.2"]
FULL = {
    "data_image": f"registry.example.com/python-data@sha256:{'d' * 64}",
    "train_image": f"registry.example.com/python-train@sha256:{'e' * 64}",
    "pull_policy": "Always",
    "pull_secrets": "[registry]",
    "run_as_user": "12345",
    "mlflow_uri": "https://mlflow.example.com",
    "ui_url": "https://kubeflow.example.com/pipeline",
    "mlflow_secret": "mlflow",
    "s3_endpoint": "https://s3.example.com",
    "data_secret": "s3-data",
    "state_secret": "s3-state",
    "git_secret": "git",
    "signing_secret": "signing",
    "state": "pvc:alignment-state",
    "data.cpu": "500m",
    "data.memory": "3Gi",
    "train.cpu": "6",
    "train.memory": "48Gi",
    "train.gpus": "1",
    "train.gpu_type": "nvidia.com/gpu",
    "train.shm": "8Gi",
    "train.node_selector": "{pool: gpu}",
    "train.tolerations": "[{key: gpu, operator: Equal, value: a100, effect: NoSchedule}]",
    "retries": "3",
    "backoff_s": "30",
    "timeout_s": "7200",
    "ttl_s": "3600",
    "labels": "{team: nlp}",
}
"""Every feature of the section that reaches the IR."""
OTHER = {"namespace", "experiment", "service_account", "nodes", "runtime", "train_job_secret"}
"""Keys that a run is started with, of which the IR has nothing, and those of training on several nodes."""
CHANGES = {
    "data_image": f"x@sha256:{'a' * 64}",
    "train_image": f"x@sha256:{'a' * 64}",
    "pull_policy": "Never",
    "state": "s3://bucket/state",
    "train.node_selector": "{}",
    "train.tolerations": "[]",
    "pull_secrets": "[]",
    "labels": "{}",
    "mlflow_uri": "https://other.example.com",
    "data.memory": "2Gi",
    "train.memory": "2Gi",
    "train.gpu_type": "amd.com/gpu",
    "ui_url": "https://x",
    "mlflow_secret": "''",
    "s3_endpoint": "''",
    "data_secret": "''",
    "state_secret": "''",
    "git_secret": "''",
    "signing_secret": "other",
    "train.shm": "''",
} | dict.fromkeys(
    ["run_as_user", "data.cpu", "train.cpu", "train.gpus", "retries", "backoff_s", "timeout_s", "ttl_s"], "2"
)
"""Another value for each of them."""

DATA_STEP, TRAIN_STEP = "fetch", "sft"
"""The steps of the golden file."""

pytestmark = pytest.mark.usefixtures("fast_compiler")


def compiled(folder: Path, settings: list[str], target: str = "kubeflow") -> list[Any]:
    """The documents of the IR."""
    out = folder / "alignment.yaml"
    compile_pipeline(load_config(PARAMS, [*REMOTE, *settings]), out, target)
    return list(yaml.safe_load_all(out.read_text(encoding="utf-8")))


def full(**changes: str) -> list[str]:
    return [f"cluster.{key}={value}" for key, value in (FULL | changes).items()]


def of_the_section(documents: list[Any], stage: str) -> dict[str, Any]:
    """What a step has from the section: its container without the program, its pod, how it is tried again."""
    container = containers(documents)[stage]
    return {
        "container": {key: value for key, value in container.items() if key not in ("command", "args")},
        "pod": platform(documents)[stage],
        "retries": documents[0]["root"]["dag"]["tasks"][stage].get("retryPolicy"),
    }


def without_secrets(documents: list[Any], stage: str) -> dict[str, Any]:
    """What a step has from the section, but for secrets, of which each step has its own."""
    found = of_the_section(documents, stage)
    return found | {"pod": {key: value for key, value in found["pod"].items() if key != "secretAsEnv"}}


def comparable(documents: list[Any]) -> dict[str, Any]:
    """What the golden file holds."""
    run = documents[1]["platforms"]["kubernetes"].get("pipelineConfig")
    return {"run": run} | {stage: of_the_section(documents, stage) for stage in (DATA_STEP, TRAIN_STEP)}


def containers(documents: list[Any]) -> dict[str, Any]:
    """The container of each step."""
    executors = documents[0]["deploymentSpec"]["executors"]
    return {name.removeprefix("exec-"): executor["container"] for name, executor in executors.items()}


def platform(documents: list[Any]) -> dict[str, Any]:
    """What kfp-kubernetes says of each step."""
    executors = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return {name.removeprefix("exec-"): executor for name, executor in executors.items()}


def variables(container: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container.get("env", [])}


# ---- the golden file


def test_a_compiled_step_of_each_image_is_the_golden_one(tmp_path: Path) -> None:
    found = comparable(compiled(tmp_path, full()))
    if os.environ.get("RENEW_GOLDEN"):
        GOLDEN.write_text(yaml.safe_dump(found, allow_unicode=True), encoding="utf-8")
    assert found == yaml.safe_load(GOLDEN.read_text(encoding="utf-8"))


def test_the_other_steps_have_what_the_golden_ones_have(tmp_path: Path) -> None:
    documents = compiled(tmp_path, full())
    for stage in STAGE_NAMES:
        golden = DATA_STEP if BY_NAME[stage].image == "data" else TRAIN_STEP
        text = yaml.safe_dump(without_secrets(documents, golden)).replace(f"component: {golden}", f"component: {stage}")
        assert without_secrets(documents, stage) == yaml.safe_load(text)


@pytest.mark.parametrize("key", FULL)
def test_the_golden_file_notices_every_setting(tmp_path: Path, key: str) -> None:
    golden = yaml.safe_load(GOLDEN.read_text(encoding="utf-8"))
    assert comparable(compiled(tmp_path, full(**{key: CHANGES[key]}))) != golden


def test_every_key_of_the_section_is_in_the_golden_file() -> None:
    assert {key.partition(".")[0] for key in FULL} | OTHER == set(ClusterConfig.model_fields)
    for name in ("data", "train"):
        inner = ClusterConfig.model_fields[name].annotation.model_fields  # type: ignore[union-attr]
        assert {key.partition(".")[2] for key in FULL if key.startswith(f"{name}.")} == set(inner)


def test_the_golden_configuration_parses_strictly(tmp_path: Path) -> None:
    compiled(tmp_path, full())
    package = parse_package((tmp_path / "alignment.yaml").read_text(encoding="utf-8"))
    assert set(package.executors) == {f"exec-{stage}" for stage in STAGE_NAMES}
    assert package.executors["exec-sft"].tolerations[0].value == "a100"


# ---- what has to hold whatever the golden file says


def test_the_cache_is_off_for_resolve_and_register_alone(tmp_path: Path) -> None:
    tasks = compiled(tmp_path, full())[0]["root"]["dag"]["tasks"]
    cached = {name: task["cachingOptions"].get("enableCache", False) for name, task in tasks.items()}
    assert cached == {stage: stage not in ("resolve", "register") for stage in STAGE_NAMES}


def test_every_parameter_has_a_description_a_type_and_the_default_of_the_configuration(tmp_path: Path) -> None:
    fields = compiled(tmp_path, full())[0]["root"]["inputDefinitions"]["parameters"]
    assert all(field["description"].strip() and field["parameterType"] for field in fields.values())
    defaults = {name: field["defaultValue"] for name, field in fields.items()}
    assert defaults == pipeline_arguments(for_its_hardware(load_config(PARAMS, [*REMOTE, *full()]), "kubeflow"))


def test_secrets_are_named_never_copied(tmp_path: Path) -> None:
    documents = compiled(tmp_path, full())
    s3 = {"access_key": "AWS_ACCESS_KEY_ID", "secret_key": "AWS_SECRET_ACCESS_KEY"}
    mlflow = {"mlflow": {"username": "MLFLOW_TRACKING_USERNAME", "password": "MLFLOW_TRACKING_PASSWORD"}}
    reads = mlflow | {
        "git": {"username": "GIT_USERNAME", "password": "GIT_PASSWORD", "host": "GIT_HOST"},
        "s3-data": s3,
    }
    trains = mlflow | {"s3-state": s3}
    expected = dict.fromkeys(STAGE_NAMES, mlflow) | dict.fromkeys(("resolve", "fetch"), reads)
    expected |= dict.fromkeys(("sft", "dpo"), trains)
    keys = {"signing_key", "cache_key", "public_keys"}
    for stage in STAGE_NAMES:
        named = {
            entry["secretName"]: {pair["secretKey"]: pair["envVar"] for pair in entry["keyToEnv"]}
            for entry in platform(documents)[stage]["secretAsEnv"]
        }
        given = named.pop("signing", {})
        assert named == expected[stage], stage
        assert all(variable == f"KUBEALIGN_{key.upper()}" for key, variable in given.items())
        assert keys >= given.keys() == set(BY_NAME[stage].keys)
        assert ("signing_key" in given) == (stage == "register"), "the one step that signs"
        assert ("cache_key" in given) == (BY_NAME[stage].image == "train" or stage == "register")
        plain = variables(containers(documents)[stage])
        assert not {variable for pairs in (reads | trains).values() for variable in pairs.values()} & plain.keys()
        assert set(plain) == {"MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "KUBEALIGN_HOME", "KUBEALIGN_KFP_URL"}


def test_the_keys_that_a_project_lists_are_those_that_its_pipeline_trusts(tmp_path: Path) -> None:
    """Whatever a run form says: its section `register` is not where a step looks."""
    line = "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE"
    documents = compiled(tmp_path, [*full(), f"register.public_keys=[{line}]"])
    for stage in STAGE_NAMES:
        named = [e for e in platform(documents)[stage]["secretAsEnv"] if e["secretName"] == "signing"]
        assert not any(pair["secretKey"] == "public_keys" for entry in named for pair in entry["keyToEnv"])
        trusts = variables(containers(documents)[stage]).get("KUBEALIGN_PUBLIC_KEYS")
        assert trusts == (line if "public_keys" in BY_NAME[stage].keys else None)


def test_a_pipeline_that_could_not_sign_is_not_compiled(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cluster.signing_secret is empty.*`kubealign keys --secret`"):
        compiled(tmp_path, full(**{"signing_secret": "''"}))


def test_state_on_a_claim_is_mounted_in_every_step(tmp_path: Path) -> None:
    documents = compiled(tmp_path, full())
    for stage in STAGE_NAMES:
        (mount,) = platform(documents)[stage]["pvcMount"]
        assert (mount["constant"], mount["mountPath"]) == ("alignment-state", "/kubealign")
        assert variables(containers(documents)[stage])["KUBEALIGN_HOME"] == "/kubealign"


@pytest.mark.parametrize("state", ["s3://bucket/state", "''"])
def test_state_elsewhere_mounts_nothing(tmp_path: Path, state: str) -> None:
    documents = compiled(tmp_path, full(state=state))
    for stage in STAGE_NAMES:
        plain = variables(containers(documents)[stage])
        assert "pvcMount" not in platform(documents)[stage] and "KUBEALIGN_HOME" not in plain
        assert plain.get("KUBEALIGN_STATE") == (state if state.startswith("s3") else None)


def test_steps_that_need_a_model_have_the_train_image_and_the_gpu(tmp_path: Path) -> None:
    documents = compiled(tmp_path, full())
    for stage in STAGE_NAMES:
        container, more = containers(documents)[stage], platform(documents)[stage]
        trains = BY_NAME[stage].image == "train"
        assert container["image"] == FULL["train_image" if trains else "data_image"]
        found = {"accelerator"} & container["resources"].keys() | {"nodeSelector", "tolerations"} & more.keys()
        assert found == ({"accelerator", "nodeSelector", "tolerations"} if trains else set())
        mounted = [mount["mountPath"] for mount in more.get("emptyDirMounts", [])]
        assert mounted == (["/dev/shm"] if trains else [])  # noqa: S108


@pytest.mark.parametrize("target", ["kubeflow", "local"])
def test_our_own_images_have_a_version(tmp_path: Path, target: str) -> None:
    images = {stage: box["image"] for stage, box in containers(compiled(tmp_path, [], target)).items()}
    assert images == {stage: TRAIN_IMAGE if BY_NAME[stage].image == "train" else DATA_IMAGE for stage in STAGE_NAMES}
    assert all(image.rpartition(":")[2] not in ("", "latest", image) for image in images.values())


def test_nothing_that_is_empty_leaves_a_trace(tmp_path: Path) -> None:
    names = [
        "mlflow_secret",
        "s3_endpoint",
        "data_secret",
        "state_secret",
        "git_secret",
        "state",
        "train.shm",
        "ui_url",
    ]
    empty = dict.fromkeys(names, "''")
    none = {"pull_secrets": "[]", "labels": "{}", "train.tolerations": "[]", "train.node_selector": "{}"}
    documents = compiled(tmp_path, full(**empty | none, retries="0", ttl_s="0", **{"train.gpus": "0"}))
    assert "pipelineConfig" not in documents[1]["platforms"]["kubernetes"]
    for stage in STAGE_NAMES:
        known = {"imagePullPolicy", "fieldPathAsEnv", "activeDeadlineSeconds", "podMetadata", "securityContext"}
        keys = {"secretAsEnv"} if BY_NAME[stage].keys else set()
        assert set(platform(documents)[stage]) == known | keys
        assert set(variables(containers(documents)[stage])) == {"MLFLOW_TRACKING_URI"}
        assert "accelerator" not in containers(documents)[stage]["resources"]
        assert "retryPolicy" not in documents[0]["root"]["dag"]["tasks"][stage]


def test_on_several_nodes_sft_and_dpo_only_start_and_follow_a_job(tmp_path: Path) -> None:
    """They are told the whole section, and need neither the training image nor a GPU themselves."""
    documents = compiled(tmp_path, full(nodes="2", runtime="our-torch"))
    for stage in STAGE_NAMES:
        container, more = containers(documents)[stage], platform(documents)[stage]
        follows = stage in ("sft", "dpo")
        trains = stage == "evaluate"
        assert container["image"] == FULL["train_image" if trains else "data_image"]
        assert ("accelerator" in container["resources"]) == trains and ("emptyDirMounts" in more) == trains
        told = variables(container).get("KUBEALIGN_CLUSTER")
        assert (told is not None) == follows
        tokens = [(mount["secretName"], mount["mountPath"]) for mount in more.get("secretAsVolume", [])]
        assert tokens == ([("kubealign-train-jobs", "/var/run/kubealign-train-jobs")] if follows else [])
        if told:
            section = ClusterConfig.model_validate_json(told)
            assert section == load_config(PARAMS, [*REMOTE, *full(nodes="2", runtime="our-torch")]).cluster


def test_the_local_target_has_nothing_of_the_cluster(tmp_path: Path) -> None:
    (document,) = compiled(tmp_path, full(), "local")
    assert not any("env" in box or "resources" in box for box in containers([document]).values())


def test_a_pods_name_is_told_from_the_settings() -> None:
    named = {"": POD_TEMPLATE, "cluster.retries=0": "metadata-0-2-system-container-impl"}
    named["cluster.labels={team: nlp}"] = "metadata-0-3-retry-system-container-impl"
    for override, template in named.items():
        assert pod_template(load_config(PARAMS, [override] if override else []).cluster) == template


# ---- refusals


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cluster.data_image=python:latest", "cluster.data_image: `latest` is not"),
        ("cluster.train_image=registry.example.com/x:latest", "cluster.train_image: `latest` is not"),
        ("cluster.data_image=python", "cluster.data_image: string should match .*with a tag or @sha256 digest"),
        ("cluster.train_image=registry.example.com:5000/x", "cluster.train_image: "),
        ("cluster.mlflow_uri=https://me:s3cr3t@mlflow", "cluster.mlflow_uri: string should match"),
        ("cluster.state=nfs:x", "cluster.state: string should match .*pvc:CLAIM or s3://bucket/prefix"),
        ("cluster.run_as_user=0", "cluster.run_as_user: input should be greater than or equal to 1"),
        ("cluster.train.memory=lots", "cluster.train.memory: string should match"),
        ("cluster.train.gpu=1", "cluster.train.gpu: no such key; did you mean cluster.train.gpus"),
        ("cluster.train.tolerations=[{kee: gpu}]", "no such key"),
        ("cluster.s3_secret=s3", "cluster.s3_secret: renamed; write cluster.data_secret .*cluster.state_secret"),
    ],
)
def test_a_setting_that_would_not_hold_in_a_cluster_is_refused(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        load_config(PARAMS, [override])
    assert error.value.exit_code == 2 and "s3cr3t" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([REMOTE[0], "data.revision=workspace"], "data.revision=workspace: a pod sees no folder of this machine; set"),
        (["data.repo=.", REMOTE[1]], "data.repo=., .*set data.repo to the URL of the git repository"),
        (["data.repo=git@git.example.com:x.git", REMOTE[1]], "data.repo=git@git.example.com:x.git: .*https URL"),
        ([*REMOTE, "cluster.mlflow_uri=''"], "cluster.mlflow_uri is empty: .*name your MLflow server"),
    ],
)
def test_what_only_this_machine_has_is_refused_for_kubeflow_alone(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    config = load_config(PARAMS, overrides)
    with pytest.raises(InputError, match=message) as error:
        compile_pipeline(config, tmp_path / "p.yaml", "kubeflow")
    assert error.value.exit_code == 2 and not (tmp_path / "p.yaml").exists()
    compile_pipeline(config, tmp_path / "p.yaml", "local")
