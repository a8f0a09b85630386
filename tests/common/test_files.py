"""Files that appear whole or not at all, and manifests that notice every change."""

import json
from pathlib import Path

import pytest

from components.common.errors import KubealignError
from components.common.files import replacing, replacing_folder, verify_manifest, write_json, write_manifest


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(RuntimeError), replacing(tmp_path / "x.json") as staging:
        staging.write_text("half")
        raise RuntimeError
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    with pytest.raises(RuntimeError), replacing_folder(tmp_path / "folder") as folder:
        (folder / "half").write_text("half")
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "y.json", float("nan"))


def test_a_manifest_notices_every_change(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    assert write_manifest(tmp_path) == verify_manifest(tmp_path)
    for change, message in (
        (lambda: (tmp_path / "a").write_text("x"), "a changed since it was written"),
        (lambda: (tmp_path / "c").write_text("c"), "c is not in the manifest"),
        ((tmp_path / "b").unlink, "b is missing"),
    ):
        change()
        with pytest.raises(KubealignError, match=message):
            verify_manifest(tmp_path)
        (tmp_path / "c").unlink(missing_ok=True)
        (tmp_path / "a").write_text("a")
