"""Packages of data: their hashes, their members, and the lock file that pins them."""

import shutil
from pathlib import Path

import pytest
import yaml

from components.common.errors import InputError
from components.config.params import load_config
from components.prepare.config import PrepareConfig
from components.prepare.sources import Package, Sources, read_sources, unpack
from components.prepare.stage import prepare_data
from tests.conftest import ROOT


def test_a_truncated_archive_and_a_changed_member_are_refused(tmp_path: Path) -> None:
    import tarfile

    (tmp_path / "pairs.json").write_text("[]")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "pairs.json", "pairs.json")
    package = Package(version="1", file="x.tar.gz", sha256="0" * 64)
    member = {"package": "x", "member": "pairs.json", "sha256": "1" * 64, "license": "none"}
    raw = {
        "packages": {"x": package.model_dump()},
        "model": member,
        "preferences": {"p": member},
        "instructions": {},
        "added": {},
    }
    sources = Sources.model_validate(raw)
    with pytest.raises(InputError, match=r"pairs.json of x.tar.gz: sha256 is 4f53cda18c2b.*expected 1111"):
        unpack(sources, sources.model, tmp_path, tmp_path / "out.json")
    content = (tmp_path / "x.tar.gz").read_bytes()
    (tmp_path / "x.tar.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"x.tar.gz: cannot unpack pairs.json"):
        unpack(sources, sources.model, tmp_path, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_an_unknown_source_names_the_known_ones(tmp_path: Path) -> None:
    shutil.copy(ROOT / "data" / "sources.lock", tmp_path)
    config = load_config(ROOT / "params.yaml").prepare
    with pytest.raises(InputError, match="prepare.preferences: nothing is not in .* expected dpo_en_demo, dpo_zh_demo"):
        prepare_data(PrepareConfig(**config.model_dump() | {"preferences": ["nothing"]}), tmp_path)


def test_sources_lock_pins_every_package_and_file_by_hash() -> None:
    raw = yaml.safe_load((ROOT / "data" / "sources.lock").read_text())
    sources = read_sources(ROOT / "data" / "sources.lock")
    assert {member.package for member in [sources.model, *sources.preferences.values()]} <= set(raw["packages"])
