"""Shared helpers of the component tests: small real inputs, and ways to run a component, as function or compiled."""

import inspect
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

import pytest
from kfp import compiler, dsl, local
from kfp.components import load_component_from_file
from kfp.local.config import LocalExecutionConfig

from components.common.provenance import code_digest
from components.config.params import load_config, pipeline_arguments
from components.orders import Facts, Order, make_order, read_order
from components.resolve.component import resolve
from components.stages import BY_NAME, ORDERED, STAGE_NAMES
from components.tracking import store
from components.tracking.run import SETTINGS
from tests.conftest import ROOT, move_home
from tests.support.stages import Stages

SMALL = [
    f"data.repo={ROOT}",
    "model.precision=fp32",
    "model.max_length=128",
    "validate.min_rows=1",
    "sft.max_steps=1",
    "dpo.max_steps=1",
    "evaluate.generations_per_language=0",
    "evaluate.bootstrap_resamples=1000",
]


@dataclass(frozen=True)
class Chain:
    """The output folders of all stages, each made from those before it."""

    dataset: Path
    base: Path
    clean: Path
    sft_model: Path
    policy: Path
    evaluation: Path
    report: Path


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with empty tables; creating them takes two seconds."""
    with pytest.MonkeyPatch.context() as patch:
        home = move_home(tmp_path_factory.mktemp("mlflow"), patch)
        store.client().search_experiments()
        return home / "mlflow.db"


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_mlflow: Path) -> Path:
    """A home folder (MLflow, checkpoints, caches) for this test alone."""
    home = move_home(tmp_path / "home", monkeypatch)
    home.mkdir()
    shutil.copy(empty_mlflow, home)
    return home


@pytest.fixture(scope="session")
def chain(stages: Stages) -> Chain:
    """All stages run once on the tiny model."""
    folder = stages.folder
    with pytest.MonkeyPatch.context() as patch:
        move_home(folder / "home", patch)
        stages.align("aligned", "dpo.max_steps=1", "evaluate.generations_per_language=0")
    aligned = folder / "aligned"
    return Chain(
        dataset=folder / "data",
        base=stages.base,
        clean=folder / "clean",
        sft_model=folder / "sft",
        policy=aligned / "policy",
        evaluation=aligned / "evaluation",
        report=aligned / "report.html",
    )


@pytest.fixture(scope="session")
def orders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Order]:
    """The order that resolve makes for each stage, for the real data and the tiny model."""
    folder = tmp_path_factory.mktemp("orders")
    with pytest.MonkeyPatch.context() as patch:
        move_home(folder / "home", patch)
        return resolved_orders(call(resolve, folder, base_model=str(tiny_model))[0])


def resolved_orders(outputs: tuple[str, ...]) -> dict[str, Order]:
    """The orders among the outputs of resolve."""
    return {name: read_order(text) for name, text in zip(ORDERED, outputs, strict=False)}


def order(stage: str, changed: dict[str, Any] | None = None, **facts: Any) -> str:
    """The order of a stage for the small configuration.

    Args:
        stage: its name.
        changed: values to change by section, not validated.
        facts: facts that differ from the dummy ones.
    """
    config = load_config(ROOT / "params.yaml", [*SMALL, "model.hardware=cpu"])
    sections = config.sections()
    for section, values in (changed or {}).items():
        sections[section].update(values)
    dummies = {field.name: field.name for field in fields(Facts)} | {
        "incumbent": "",
        "decision_index": 1,
        "data_clean": True,
    }
    return make_order(BY_NAME[stage], sections, dummies | facts, code_digest(stage)).as_json()


@pytest.fixture
def runs(own_home: Path) -> dict[str, str]:
    """A run for every stage before register, in the test's own MLflow."""
    client = store.client()
    run_id = client.create_run(store.experiment_id(client)).info.run_id
    client.log_text(run_id, (ROOT / "params.yaml").read_text(encoding="utf-8"), SETTINGS)
    return {f"{stage}_run": run_id for stage in STAGE_NAMES[:-1]}


def judged_inputs(chain: Chain) -> dict[str, Any]:
    """The inputs of register that match the chain's evaluation."""
    from tests.support.stages import SETTINGS, TEST_SET

    gate = load_config(ROOT / "params.yaml", SETTINGS).gate
    folders = {"dataset": chain.clean, "base": chain.base, "policy": chain.policy}
    folders |= {"evaluation": chain.evaluation, "report": chain.report}
    return folders | {"order": order("register", {"gate": gate.model_dump(mode="json")}, test_set=TEST_SET)}


def call(component: Any, folder: Path, **given: Any) -> tuple[Any, dict[str, dsl.Artifact]]:
    """Call a component's function.

    Args:
        component: a KFP component.
        folder: gets the output artifacts, each at its name.
        given: the path of every input artifact, and the parameters that differ from the small configuration.

    Returns:
        the function's return value, and the artifacts.
    """
    artifacts = {
        name: kind(name=name, uri=str(given.get(name, folder / name))) for name, kind in _artifacts(component).items()
    }
    return component.python_func(**_parameters(component, given), **artifacts), artifacts


def assert_refused(
    message: str, output: pytest.CaptureFixture[str], component: Any, folder: Path, **given: Any
) -> None:
    """Assert that a call exits with code 2 and prints one error line, which contains `message`."""
    with pytest.raises(SystemExit) as stop:
        call(component, folder, **given)
    errors = [line for line in output.readouterr().out.splitlines() if line.startswith("[error")]
    assert stop.value.code == 2 and len(errors) == 1, errors
    assert errors[0].startswith(f"[error:2] {component.name} ") and message in errors[0]


def run_locally(component: Any, folder: Path, **given: Any) -> Path:
    """Run a compiled component under KFP's local runner, its input artifacts imported.

    Args:
        component: a KFP component.
        folder: to work in.
        given: as for `call`.

    Returns:
        the folder with the output artifacts, each at its name.
    """
    compiled = folder / "component.yaml"
    compiler.Compiler().compile(component, str(compiled))
    step = load_component_from_file(str(compiled))
    kinds = {name: kind for name, kind in _artifacts(component).items() if name in given}

    @dsl.pipeline(name="one-step")
    def one_step() -> None:
        imported = {
            name: dsl.importer(artifact_uri=str(given[name]), artifact_class=kind).output
            for name, kind in kinds.items()
        }
        step(**_parameters(component, given), **imported)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalExecutionConfig, "instance", None)
        runner = local.SubprocessRunner(use_venv=False)
        local.init(runner, pipeline_root=str(folder / "steps"), workspace_root=str(folder / "workspace"))
        one_step()
    return next((folder / "steps").glob(f"one-step-*/{component.name}"))


def _artifacts(component: Any) -> dict[str, type[dsl.Artifact]]:
    """The artifact types of a component's inputs and outputs, by name."""
    parameters = inspect.signature(component.python_func).parameters.values()
    return {
        parameter.name: get_args(parameter.annotation)[0] for parameter in parameters if get_args(parameter.annotation)
    }


def _parameters(component: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a component: as given, else as configured, else (run ids) the parameter's own name."""
    configured = pipeline_arguments(load_config(ROOT / "params.yaml", SMALL))
    if component.name in ORDERED:
        configured["order"] = order(component.name)
    names = inspect.signature(component.python_func).parameters.keys() - _artifacts(component).keys()
    return {name: given.get(name, configured.get(name, name)) for name in names}
