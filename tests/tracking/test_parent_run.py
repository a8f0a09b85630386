"""One parent run in MLflow for a run on Kubeflow, whatever is started twice."""

from typing import Any

import pytest

from components.tracking import store
from components.tracking.run import _parent_on_kubeflow, parent_run, stage_run


@pytest.fixture
def on_kubeflow(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("KUBEALIGN_KFP_RUN", "0f3c")
    _parent_on_kubeflow.cache_clear()
    yield store.client()
    _parent_on_kubeflow.cache_clear()


def runs(client: Any, kind: str) -> list[Any]:
    found: list[Any] = client.search_runs([store.experiment_id(client)], f"tags.`{kind}` != ''")
    return found


def test_every_step_of_a_run_finds_the_same_parent(on_kubeflow: Any) -> None:
    parents = []
    for stage in ("resolve", "fetch"):
        _parent_on_kubeflow.cache_clear()  # each step is a process of its own
        with stage_run(stage, {}) as run:
            parents.append(on_kubeflow.get_run(run.run_id).data.tags["mlflow.parentRunId"])
    (parent,) = runs(on_kubeflow, "kubealign.kfp_run")
    assert parents == [parent.info.run_id] * 2 and parent.info.status == "RUNNING"


def test_the_last_step_ends_the_parent_and_a_failure_fails_it_until_a_retry(on_kubeflow: Any) -> None:
    with pytest.raises(RuntimeError), stage_run("sft", {}):
        raise RuntimeError("node lost")
    (parent,) = runs(on_kubeflow, "kubealign.kfp_run")
    assert parent.info.status == "FAILED"
    with stage_run("sft", {}):
        assert on_kubeflow.get_run(parent.info.run_id).info.status == "RUNNING"
    with stage_run("register", {}):
        pass
    assert on_kubeflow.get_run(parent.info.run_id).info.status == "FINISHED"


def test_what_an_evicted_pod_left_open_is_closed_when_its_step_starts_again(on_kubeflow: Any) -> None:
    evicted = stage_run("dpo", {})
    left = evicted.__enter__()  # and never left: the pod is gone
    with stage_run("dpo", {}) as again:
        assert on_kubeflow.get_run(left.run_id).info.status == "KILLED"
        assert on_kubeflow.get_run(again.run_id).info.status == "RUNNING"
    del evicted


def test_without_kubeflow_there_is_no_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBEALIGN_KFP_RUN", raising=False)
    assert parent_run() == ""
