"""A mirror of a checkpoint folder in an S3 bucket, for machines whose disks do not outlive a step (KUBEALIGN_STATE).

A mirrored checkpoint counts once its manifest is there, which is uploaded last; a damaged one is skipped when it is
loaded, like any other checkpoint.
"""

import os
from pathlib import Path
from typing import Any

from components.common.errors import InputError, KubealignError
from components.common.files import MANIFEST, check_listed, inside, parse_manifest, replacing_folder
from components.engine.checkpoints import stored
from components.tracking.storage import s3_filesystem

VARIABLE = "KUBEALIGN_STATE"


class Mirror:
    """The mirror of one local checkpoint folder.

    Args:
        folder: the local folder, with a folder `step-…` for each checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        location = os.environ.get(VARIABLE, "").rstrip("/")
        self.remote = f"{location.removeprefix('s3://')}/{folder.parent.name}/{folder.name}"
        self.fs: Any = None
        self._uploaded: set[str] = set()
        if location:
            self.fs = s3_filesystem()

    def download(self) -> None:
        """Download every complete checkpoint that is missing locally."""
        if self.fs is None:
            return
        remote = self._remote()
        for name in {key.partition("/")[0] for key in remote if key.endswith(f"/{MANIFEST}")}:
            if inside(self.folder, name).exists():
                continue
            where = f"{self.remote}/{name}"
            files = {key.removeprefix(f"{name}/") for key in remote if key.startswith(f"{name}/")}
            try:
                hashes = parse_manifest(self.fs.cat_file(f"{where}/{MANIFEST}"), where)
            except InputError:
                raise
            except KubealignError:  # damaged, like one that is skipped when it is loaded
                continue
            check_listed(files, hashes, where)
            with replacing_folder(self.folder / name) as staging:
                for file in files:
                    self.fs.get_file(f"{where}/{file}", str(inside(staging, file)))

    def upload(self) -> None:
        """Upload every checkpoint that is missing in the bucket, and delete there what no longer exists locally."""
        if self.fs is None:
            return
        local = {path.name: path for path in stored(self.folder)}
        if set(local) == self._uploaded:
            return
        remote = self._remote()
        for name, path in local.items():
            if f"{name}/{MANIFEST}" not in remote:
                for file in sorted(path.iterdir(), key=lambda file: file.name == MANIFEST):
                    self.fs.put_file(str(file), f"{self.remote}/{name}/{file.name}")
        for key in sorted(remote, key=lambda key: not key.endswith(f"/{MANIFEST}")):
            if key.partition("/")[0] not in local:
                self.fs.rm_file(f"{self.remote}/{key}")
        self._uploaded = set(local)

    def _remote(self) -> set[str]:
        """Names of the files in the bucket, `step-…/file`."""
        return {path.removeprefix(f"{self.remote}/") for path in self.fs.find(self.remote)}
