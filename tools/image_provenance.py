"""Say how an image was built, as an in-toto statement with a SLSA provenance predicate; `make images` runs it.

    python tools/image_provenance.py IMAGE --target data --engine docker --base python:3.11-slim --sbom FILE > STATEMENT

The subject is the image's id, which is the digest of its configuration and so of its layers: the digest of the manifest
is known after a push alone (`kubealign images --digest`). The statement is not signed: it is as good as the machine
that built. Standard library only.
"""

import argparse
import datetime
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
INPUTS = (
    "requirements.lock",
    "pyproject.toml",
    "components/Containerfile",
    "components/build_image.sh",
    "tools/install_locked.py",
)


def inspected(engine: str, image: str) -> dict[str, Any] | None:
    """What the engine knows of an image; None if it has none of that name."""
    done = subprocess.run([engine, "image", "inspect", image], capture_output=True, text=True, check=False)
    found: list[dict[str, Any]] = json.loads(done.stdout) if done.returncode == 0 else []
    return found[0] if found else None


def sha256(path: Path) -> dict[str, str]:
    """The digest of a file, as in-toto writes it."""
    return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def base_digest(engine: str, base: str) -> dict[str, str]:
    """The digest of the base image if its name or the engine tells it; a builder may keep it to itself."""
    known = [base, *((inspected(engine, base) or {}).get("RepoDigests") or [])]
    digests = [name.partition("@sha256:")[2] for name in known if "@sha256:" in name]
    return {"sha256": digests[0]} if digests else {}


def statement(image: str, target: str, engine: str, base: str, torch_index: str, sbom: Path) -> dict[str, Any]:
    """The statement on an image that the engine has."""
    found = inspected(engine, image)
    if not found:
        sys.exit(f"error: {engine} has no image {image}; `make images` builds it")
    labels = found["Config"]["Labels"] or {}
    base_image: dict[str, Any] = {"uri": f"oci:{base}"}
    if digest := base_digest(engine, base):
        base_image["digest"] = digest
    source = {
        "uri": f"git+{labels.get('org.opencontainers.image.source', 'unknown')}",
        "digest": {"gitCommit": labels.get("org.opencontainers.image.revision", "unknown")},
    }
    files = [{"uri": f"file:{name}", "digest": sha256(ROOT / name)} for name in INPUTS]
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": image, "digest": {"sha256": found["Id"].removeprefix("sha256:")}}],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": "urn:kubealign:make-images:1",
                "externalParameters": {"target": target, "BASE_IMAGE": base, "TORCH_INDEX": torch_index},
                "internalParameters": {"code": labels.get("kubealign.code", "")},
                "resolvedDependencies": [source, base_image, *files],
            },
            "runDetails": {
                "builder": {"id": f"urn:kubealign:make-images:{engine}"},
                "metadata": {"finishedOn": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")},
                "byproducts": [{"name": sbom.name, "digest": sha256(sbom)}],
            },
        },
    }


def main() -> None:
    """Print the statement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image")
    for name in ("--target", "--engine", "--base"):
        parser.add_argument(name, required=True)
    parser.add_argument("--torch-index", default="")
    parser.add_argument("--sbom", type=Path, required=True)
    given = parser.parse_args()
    found = statement(given.image, given.target, given.engine, given.base, given.torch_index, given.sbom)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
