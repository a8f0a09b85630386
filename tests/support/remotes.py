"""A repository whose data is in a DVC remote."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from components.config.params import load_config
from components.fetch.stage import fetch_data
from tests.conftest import ROOT

FOLDER = "corpus/pairs"


@dataclass
class Remote:
    """A repository whose data is in corpus/pairs, with unrelated data beside it."""

    root: Path
    digests: dict[str, str]
    commit: str

    def wipe(self) -> None:
        """Delete the data from this machine."""
        shutil.rmtree(self.root / ".dvc" / "cache", ignore_errors=True)
        for path in (self.root / FOLDER).iterdir():
            if path.is_dir():
                shutil.rmtree(path)


def fetch(remote: Remote, out: Path, repo: str = "") -> Path:
    data = load_config(ROOT / "params.yaml").data
    fetch_data(data.model_copy(update=source(remote, repo)), remote.digests, out / "dataset")
    return out / "dataset"


def source(remote: Remote, repo: str = "") -> dict[str, str]:
    return {"repo": repo or str(remote.root), "path": FOLDER, "revision": remote.commit}
