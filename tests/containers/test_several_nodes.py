"""Two containers of the training image, a torchrun process in each, give the losses of one process.

What Kubeflow Trainer starts on two machines, on one: the same image, command and environment, a disk for each node.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.common.images import TRAIN_IMAGE
from components.config.params import load_config
from components.sft.stage import run_sft
from tests.conftest import ROOT
from tests.containers.conftest import IMAGE_USER
from tests.support.services import free_port, mlflow_server
from tests.support.stages import SETTINGS, Stages

pytestmark = pytest.mark.containers


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "history.jsonl").read_text().splitlines()]


def open_to_all(folder: Path) -> None:
    """The images' user is not the one who runs the tests."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    for parent in folder.parents:
        if parent.stat().st_uid == os.getuid() and parent != Path("/tmp"):  # noqa: S108 - pytest's folders are 0700
            parent.chmod(parent.stat().st_mode | 0o011)


def test_two_containers_give_the_losses_of_one_process(client: Any, stages: Stages, tmp_path: Path) -> None:
    config = load_config(ROOT / "params.yaml", [*SETTINGS, "sft.max_steps=3", "sft.batch_size=3"])
    run_sft(config.sft, config.model, stages.folder / "clean", stages.base, tmp_path / "one")
    shared = tmp_path / "shared"
    for name, source in (("clean", stages.folder / "clean"), ("base", stages.base)):
        shutil.copytree(source, shared / name)
    (shared / "params.yaml").write_text(yaml.safe_dump(config.sections()))
    open_to_all(shared)
    homes = [tmp_path / f"node-{rank}" for rank in range(2)]
    for home in homes:
        home.mkdir()
        home.chmod(0o777)
        os.chown(home, IMAGE_USER, 0)
    words = ["torchrun", "--nproc-per-node=1", "-m", "components", "sft", f"--dataset={shared}/clean"]
    words += [f"--base={shared}/base", f"--params={shared}/params.yaml"]
    nodes = []
    port = str(free_port())
    with mlflow_server(tmp_path) as address:
        for rank, home in enumerate(homes):
            environment = {"PET_NNODES": "2", "PET_NODE_RANK": str(rank), "PET_MASTER_ADDR": "127.0.0.1"}
            environment |= {"PET_MASTER_PORT": port, "PET_NPROC_PER_NODE": "auto", "OMP_NUM_THREADS": "1"}
            environment |= {"KUBEALIGN_HOME": str(home), "MLFLOW_TRACKING_URI": address}
            nodes.append(
                client.containers.run(
                    TRAIN_IMAGE,
                    [*words, f"--out={home}/out", f"--result={home}/result.json"],
                    detach=True,
                    network_mode="host",
                    read_only=True,
                    tmpfs={"/tmp": "rw,exec,mode=1777"},  # noqa: S108 - the container's own
                    cap_drop=["ALL"],
                    environment=environment,
                    volumes={
                        str(shared): {"bind": str(shared), "mode": "ro"},
                        str(home): {"bind": str(home), "mode": "rw"},
                    },
                )
            )
        try:
            codes = [node.wait(timeout=600)["StatusCode"] for node in nodes]
            assert codes == [0, 0], b"".join(node.logs() for node in nodes).decode()[-4000:]
        finally:
            for node in nodes:
                node.remove(force=True)
    assert losses(homes[0] / "out") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert not (homes[1] / "out").exists() and json.loads((homes[0] / "result.json").read_text())["run_id"]
    assert not list(homes[1].glob("checkpoints/*/step-*"))


def test_the_mlflow_image_serves_and_knows_its_database_driver(client: Any) -> None:
    from components.common.images import MLFLOW_IMAGE

    program = "import psycopg2, boto3, mlflow.server.auth, importlib.util as u; print(u.find_spec('torch'))"
    options = {"remove": True, "read_only": True, "network_mode": "none", "cap_drop": ["ALL"]}
    said = client.containers.run(MLFLOW_IMAGE, ["python", "-c", program], tmpfs={"/tmp": ""}, **options)  # noqa: S108
    assert said.strip().splitlines()[-1] == b"None"
    assert client.images.get(MLFLOW_IMAGE).attrs["Size"] <= 1_100_000_000
