"""Threads follow the CPU quota of the control group, in both versions of the interface."""

from pathlib import Path

import pytest

from components.common import cpus


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 8 CPUs with control groups in a folder."""
    monkeypatch.setattr(cpus, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cpus, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(cpus.os, "sched_getaffinity", lambda _: set(range(8)))
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("limit", "expected"), [("140000 100000", 1), ("50000 100000", 1), ("400000 100000", 4), ("max 100000", 8)]
)
@pytest.mark.parametrize("place", ["", "kubepods/pod1", "kubepods/pod1/container"])
def test_a_quota_of_the_second_version_counts_wherever_it_stands(
    groups: Path, place: str, limit: str, expected: int
) -> None:
    write(groups / "own", "0::/kubepods/pod1/container\n")
    write(groups / "cgroup" / place / "cpu.max", f"{limit}\n")
    assert cpus.available_cpus() == expected


@pytest.mark.parametrize(("quota", "expected"), [("150000", 1), ("300000", 3), ("-1", 8), ("9000000", 8)])
def test_a_quota_of_the_first_version_counts(groups: Path, quota: str, expected: int) -> None:
    write(groups / "own", "5:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n0::/docker/x\n")
    for name, value in (("quota", quota), ("period", "100000")):
        write(groups / "cgroup" / "cpu,cpuacct" / f"cpu.cfs_{name}_us", value + "\n")
    assert cpus.available_cpus() == expected


def test_without_control_groups_it_is_the_cpus_that_one_may_run_on(groups: Path) -> None:
    assert cpus.available_cpus() == 8
    write(groups / "own", "0::/\n")
    write(groups / "cgroup" / "cpu.max", "garbage\n")
    assert cpus.available_cpus() == 8
