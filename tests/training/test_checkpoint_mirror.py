"""Checkpoints that live in an S3 bucket: a step on a fresh disk goes on where the last one was."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from components.common.files import write_manifest
from components.training.checkpoint_mirror import Mirror
from tests.support.services import S3, s3_server
from tests.support.stages import Stages


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with s3_server(tmp_path_factory.mktemp("s3")) as found:
        yield found


@pytest.fixture
def bucket(s3: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("KUBEALIGN_STATE", f"s3://{s3.bucket}/state")
    return s3


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"step-{step:06d}"
    path.mkdir(parents=True)
    (path / "parameters.safetensors").write_text(f"step {step}")
    write_manifest(path)
    return path


@pytest.mark.integration
def test_a_fresh_disk_gets_every_whole_checkpoint_and_no_other(bucket: S3, tmp_path: Path) -> None:
    here = tmp_path / "one" / "checkpoints" / "sft-1"
    checkpoint(here, 1)
    whole, torn = checkpoint(here, 2), checkpoint(here, 3)
    Mirror(here).upload()
    key = f"state/checkpoints/sft-1/{torn.name}/manifest.json"
    boto3.client("s3").delete_object(Bucket=bucket.bucket, Key=key)
    shutil.rmtree(here / "step-000001")
    fresh = tmp_path / "two" / "checkpoints" / "sft-1"
    Mirror(fresh).download()
    assert sorted(path.name for path in fresh.iterdir()) == ["step-000001", whole.name]
    assert (fresh / whole.name / "parameters.safetensors").read_text() == "step 2"


@pytest.mark.integration
def test_checkpoints_that_are_dropped_here_are_dropped_there(bucket: S3, tmp_path: Path) -> None:
    here = tmp_path / "checkpoints" / "sft-2"
    old = checkpoint(here, 1)
    mirror = Mirror(here)
    mirror.upload()
    checkpoint(here, 2)
    shutil.rmtree(old)
    mirror.upload()
    fresh = tmp_path / "two" / "checkpoints" / "sft-2"
    Mirror(fresh).download()
    assert [path.name for path in fresh.iterdir()] == ["step-000002"]


def test_without_a_state_nothing_leaves_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBEALIGN_STATE", raising=False)
    mirror = Mirror(tmp_path)
    mirror.upload()
    mirror.download()
    assert mirror.fs is None


@pytest.mark.integration
def test_a_stage_on_another_machine_resumes_from_the_bucket(
    bucket: S3, stages: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both run the same sft; the second finds the last checkpoint of the first, which is after its last step."""
    first = stages.sft(tmp_path / "first", home=tmp_path / "machine-1")
    capsys.readouterr()
    second = stages.sft(tmp_path / "second", home=tmp_path / "machine-2")
    assert "resuming after step" in capsys.readouterr().out
    name = "adapter/adapter_model.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()
