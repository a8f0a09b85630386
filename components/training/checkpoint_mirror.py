"""A copy of a checkpoint folder in an S3 bucket, for machines whose disks do not outlive a step (KUBEALIGN_STATE).

A folder of the copy counts once its manifest is there, which goes up last; what arrives damaged is passed over when it
is loaded, like any other checkpoint.
"""

import os
from pathlib import Path
from typing import Any

from components.common.files import MANIFEST, replacing_folder
from components.engine.checkpoints import stored

VARIABLE = "KUBEALIGN_STATE"


class Mirror:
    """The copy of one local folder of checkpoints.

    Args:
        folder: the local folder, with a folder `step-…` for each checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        place = os.environ.get(VARIABLE, "")
        self.bucket, _, prefix = place.removeprefix("s3://").partition("/")
        self.prefix = f"{prefix.strip('/')}/{folder.parent.name}/{folder.name}/".lstrip("/")
        self.client: Any = None
        self._pushed: set[str] = set()
        if place:
            import boto3

            self.client = boto3.client("s3")

    def pull(self) -> None:
        """Bring every whole checkpoint here that is not here yet."""
        if self.client is None:
            return
        remote = self._remote()
        for name in {key.partition("/")[0] for key in remote if key.endswith(f"/{MANIFEST}")}:
            if (self.folder / name).exists():
                continue
            with replacing_folder(self.folder / name) as aside:
                for key in (key for key in remote if key.startswith(f"{name}/")):
                    self.client.download_file(self.bucket, self.prefix + key, str(aside / key.partition("/")[2]))

    def push(self) -> None:
        """Bring every checkpoint there that is not there yet, and remove there what is no longer here."""
        if self.client is None:
            return
        local = {path.name: path for path in stored(self.folder)}
        if set(local) == self._pushed:
            return
        remote = self._remote()
        for name, path in local.items():
            if f"{name}/{MANIFEST}" not in remote:
                for file in sorted(path.iterdir(), key=lambda file: file.name == MANIFEST):
                    self.client.upload_file(str(file), self.bucket, f"{self.prefix}{name}/{file.name}")
        for key in sorted(remote, key=lambda key: not key.endswith(f"/{MANIFEST}")):
            if key.partition("/")[0] not in local:
                self.client.delete_object(Bucket=self.bucket, Key=self.prefix + key)
        self._pushed = set(local)

    def _remote(self) -> set[str]:
        """Keys below the prefix, `step-…/file`."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix)
        return {entry["Key"].removeprefix(self.prefix) for page in pages for entry in page.get("Contents", [])}
