"""The compiled register component under KFP's local runner."""

from pathlib import Path

from components.common.files import read_json
from components.register.component import register
from components.tracking import store
from tests.support.component_kit import Chain, judged_inputs, run_locally


def test_the_version_is_in_the_registry_and_the_result_an_output_artifact(
    chain: Chain, runs: dict[str, str], tmp_path: Path
) -> None:
    judged = judged_inputs(chain)
    made = run_locally(register, tmp_path, **judged, **runs)
    result = read_json(made / "result")
    version = store.client().get_model_version(result["model"], result["version"])
    assert version.tags["kubealign.verdict"] == result["verdict"]["verdict"]
