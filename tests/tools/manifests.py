"""Check the manifests of k8s/: `make check-manifests`, or `python tests/tools/manifests.py [OVERLAY...]`.

Every overlay is built by `kubectl kustomize`, and what comes out is checked against the schemas of Kubernetes (no
unknown field), for quantities, for references (what is named exists), and against the restricted Pod Security
Standard. A kind without a schema is an error, unless it is a known one, whose own models check it then.
"""

import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from components.stages import STAGE_NAMES
from tests.tools.pod_security import violations

K8S = Path(__file__).resolve().parents[2] / "k8s"
OVERLAYS = ("dev", "prod", "admission")
SECRETS = "secrets.template.yaml"
KUBERNETES = "1.33"
"""The oldest version of Kubernetes that the manifests are for."""
KNOWN_KINDS = {"TrainingRuntime": "TrainerV1alpha1TrainingRuntime"}
"""Kinds that Kubernetes itself does not know, and their model in kubeflow_trainer_api."""
STEPS = set(STAGE_NAMES)
"""Components that pipeline runs bring."""
SUFFIXES = {"": 1, "m": Decimal("0.001")} | {s: 1000 ** (n + 1) for n, s in enumerate("kMGTPE")}
SUFFIXES |= {f"{s}i": 1024 ** (n + 1) for n, s in enumerate("KMGTPE")}
Manifest = dict[str, Any]


def build(overlay: str) -> list[Manifest]:
    """What an overlay consists of, with the secrets that the templates describe."""
    words = ["kubectl", "kustomize", str(K8S / "overlays" / overlay)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        sys.exit("error: kubectl is not installed, so no manifest was checked; https://kubernetes.io/docs/tasks/tools/")
    if done.returncode:
        sys.exit(f"error: {' '.join(words)}: {done.stderr.strip()}")
    return [*yaml.safe_load_all(done.stdout), *yaml.safe_load_all((K8S / SECRETS).read_text(encoding="utf-8"))]


def problems(manifests: list[Manifest]) -> list[str]:
    """Everything that is wrong with an overlay, a sentence each that begins with kind and name."""
    found = []
    for manifest in manifests:
        name = f"{manifest.get('kind')}/{(manifest.get('metadata') or {}).get('name')}"
        for check in (_schema, _quantities, _pods):
            found += [f"{name}: {problem}" for problem in check(manifest)]
        found += [f"{name}: {problem}" for problem in _references(manifest, manifests)]
    return found


def pods(value: Any) -> Iterator[Manifest]:
    """Every pod template below a value, with metadata and spec."""
    if isinstance(value, dict):
        if "containers" in (value.get("spec") or {} if isinstance(value.get("spec"), dict) else {}):
            yield value
        for inner in value.values():
            yield from pods(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from pods(inner)


def _schema(manifest: Manifest) -> Iterator[str]:
    yield from _schema_problems(json.dumps(manifest, sort_keys=True))


@functools.cache
def _schema_problems(text: str) -> list[str]:
    """Kept for each manifest as it is: loading the schemas takes most of the time."""
    return list(_against_schema(json.loads(text)))


def _against_schema(manifest: Manifest) -> Iterator[str]:
    import kubernetes_validate

    kind = manifest["kind"]
    if kind in KNOWN_KINDS:
        from kubeflow_trainer_api import models

        model = getattr(models, KNOWN_KINDS[kind])
        yield from dropped(manifest, model.from_dict(manifest).to_dict())
        return
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{'.'.join(map(str, error.path))}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError:
        yield f"Kubernetes {KUBERNETES} has no {kind} of {manifest['apiVersion']}, and it is not a known kind"


def dropped(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """What a round trip through a model has lost or changed."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in before.items():
            yield from dropped(value, after.get(key), f"{path}.{key}".lstrip("."))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from dropped(one, other, f"{path}[{number}]")
    elif before != after and before not in ({}, []):
        yield f"{path}: {before!r} becomes {after!r} in Kubeflow's own model"


# ---- quantities


def quantity(text: Any) -> Decimal | None:
    """The number that a Kubernetes quantity stands for; None when it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([A-Za-z]*)", str(text))
    return Decimal(match[1]) * SUFFIXES[match[2]] if match and match[2] in SUFFIXES else None


def _quantities(manifest: Manifest, path: str = "") -> Iterator[str]:
    for where, key, value in _walk(manifest):
        if key in ("requests", "limits", "hard", "default", "defaultRequest", "max", "min") and isinstance(value, dict):
            for name, amount in value.items():
                if quantity(amount) is None:
                    yield f"{where}.{name}: {amount!r} is not a quantity such as 500m or 2Gi"
        if key == "sizeLimit" and quantity(value) is None:
            yield f"{where}: {value!r} is not a quantity such as 2Gi"
        if key == "resources" and isinstance(value, dict):
            for name, wanted in (value.get("requests") or {}).items():
                least, most = quantity(wanted), quantity((value.get("limits") or {}).get(name, wanted))
                if least is not None and most is not None and least > most:
                    yield f"{where}: requests more {name} than its limit"


def _walk(value: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            where = f"{path}.{key}".lstrip(".")
            yield where, key, inner
            yield from _walk(inner, where)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _walk(inner, f"{path}[{number}]")


# ---- pods


def _pods(manifest: Manifest) -> Iterator[str]:
    for pod in pods(manifest):
        yield from violations(pod["spec"], (pod.get("metadata") or {}).get("annotations"))
        volumes = {volume["name"] for volume in pod["spec"].get("volumes") or []}
        volumes |= {claim["metadata"]["name"] for claim in manifest["spec"].get("volumeClaimTemplates") or []}
        for container in _containers(pod):
            if not re.search(r"(:(?!latest$)[\w.-]+|@sha256:[0-9a-f]{64})$", container["image"]):
                yield f"container {container['name']}: image {container['image']} has no definite version"
            if not (container.get("securityContext") or {}).get("readOnlyRootFilesystem"):
                yield f"container {container['name']}: its root file system can be written"
            for mount in container.get("volumeMounts") or []:
                if mount["name"] not in volumes:
                    yield f"container {container['name']}: mounts {mount['name']}, which is no volume of the pod"
            if "resources" not in container and manifest["kind"] not in KNOWN_KINDS:
                yield f"container {container['name']}: no resources"


def _containers(pod: Manifest) -> list[Manifest]:
    return [*(pod["spec"].get("initContainers") or []), *pod["spec"]["containers"]]


# ---- references


def _references(manifest: Manifest, all_: list[Manifest]) -> Iterator[str]:
    for pod in pods(manifest):
        yield from _pod_references(pod, manifest, all_)
    spec = manifest.get("spec") or {}
    kind = manifest["kind"]
    if kind == "Service":
        yield from _service(spec, all_)
    if kind == "PodDisruptionBudget" and not _matching(spec["selector"]["matchLabels"], all_):
        yield "selects no pod"
    if kind in ("Deployment", "StatefulSet"):
        wanted, labels = spec["selector"]["matchLabels"], spec["template"]["metadata"]["labels"]
        if not wanted.items() <= labels.items():
            yield "its selector does not match its own pods"
    if kind == "StatefulSet" and not _named("Service", spec["serviceName"], all_):
        yield f"service {spec['serviceName']} does not exist"
    if kind == "RoleBinding":
        for what in [manifest["roleRef"], *manifest["subjects"]]:
            if not _named(what["kind"], what["name"], all_):
                yield f"{what['kind']} {what['name']} does not exist"
    if kind == "ValidatingAdmissionPolicyBinding" and not _named("ValidatingAdmissionPolicy", spec["policyName"], all_):
        yield f"policy {spec['policyName']} does not exist"
    if kind == "NetworkPolicy":
        yield from _policy(spec, all_)


def _pod_references(pod: Manifest, manifest: Manifest, all_: list[Manifest]) -> Iterator[str]:
    account = pod["spec"].get("serviceAccountName", "default")
    if not _named("ServiceAccount", account, all_):
        yield f"service account {account} does not exist"
    yield from _volumes(pod, all_)
    scripts = _scripts(pod, all_)
    for container in _containers(pod):
        for problem in (*_environment(container, all_), *_ports(container), *_addresses(container, all_)):
            yield f"container {container['name']}: {problem}"
        for word in [*(container.get("command") or []), *(container.get("args") or [])]:
            if word.startswith("/scripts/") and word.removeprefix("/scripts/") not in scripts:
                yield f"container {container['name']}: {word} is in no config map that it mounts"


def _volumes(pod: Manifest, all_: list[Manifest]) -> Iterator[str]:
    for volume in pod["spec"].get("volumes") or []:
        claim = (volume.get("persistentVolumeClaim") or {}).get("claimName")
        if claim and not _named("PersistentVolumeClaim", claim, all_):
            yield f"claim {claim} does not exist"
        if "configMap" in volume:
            yield from _key("ConfigMap", volume["configMap"]["name"], None, all_)
        if "secret" in volume:
            yield from _key("Secret", volume["secret"]["secretName"], None, all_)


def _environment(container: Manifest, all_: list[Manifest]) -> Iterator[str]:
    for entry in container.get("env") or []:
        source = entry.get("valueFrom") or {}
        for ref, of in (("secretKeyRef", "Secret"), ("configMapKeyRef", "ConfigMap")):
            if ref in source:
                yield from _key(of, source[ref]["name"], source[ref]["key"], all_)
    for source in container.get("envFrom") or []:
        for ref, of in (("secretRef", "Secret"), ("configMapRef", "ConfigMap")):
            if ref in source:
                yield from _key(of, source[ref]["name"], None, all_)


def _ports(container: Manifest) -> Iterator[str]:
    named = {port.get("name") for port in container.get("ports") or []}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        for how in ("httpGet", "tcpSocket"):
            port = ((container.get(probe) or {}).get(how) or {}).get("port")
            if isinstance(port, str) and port not in named:
                yield f"{probe} asks the port {port}, which it does not have"


def _scripts(pod: Manifest, all_: list[Manifest]) -> set[str]:
    maps = [volume["configMap"]["name"] for volume in pod["spec"].get("volumes") or [] if "configMap" in volume]
    return {key for name in maps for found in _named("ConfigMap", name, all_) for key in found.get("data") or {}}


def _addresses(container: Manifest, all_: list[Manifest]) -> Iterator[str]:
    """Services of this namespace that are named in the environment, by URL or as PGHOST and PGPORT."""
    values = {entry["name"]: entry.get("value", "") for entry in container.get("env") or []}
    for source in container.get("envFrom") or []:
        for found in _named("ConfigMap", (source.get("configMapRef") or {}).get("name"), all_):
            values |= found.get("data") or {}
    places = [match.groups() for value in values.values() if (match := re.match(r"http://([\w-]+):(\d+)", value))]
    if values.get("PGHOST"):
        places.append((values["PGHOST"], values.get("PGPORT", "5432")))
    for host, port in places:
        if "." in host:
            continue
        services = _named("Service", host, all_)
        if not services:
            yield f"service {host} does not exist"
        elif int(port) not in [entry["port"] for entry in services[0]["spec"]["ports"]]:
            yield f"service {host} has no port {port}"


def _service(spec: Manifest, all_: list[Manifest]) -> Iterator[str]:
    chosen = _matching(spec["selector"], all_)
    if not chosen:
        yield "selects no pod"
    for port in spec["ports"]:
        target = port.get("targetPort", port["port"])
        for pod in chosen:
            ports = [entry for container in pod["spec"]["containers"] for entry in container.get("ports") or []]
            if target not in {entry.get("name") for entry in ports} | {entry["containerPort"] for entry in ports}:
                yield f"port {target} is no port of the pods that it selects"


def _policy(spec: Manifest, all_: list[Manifest]) -> Iterator[str]:
    """Components that a policy selects must exist, and a port that it opens to one of ours must be one of its."""
    known = STEPS | {label for pod in pods(all_) if (label := _labels(pod).get("app.kubernetes.io/component"))}
    for _, key, value in _walk({"spec": spec}):
        if key in ("podSelector",) and isinstance(value, dict):
            for component in _components(value):
                if component not in known:
                    yield f"selects the component {component}, which no pod has"
    for rule in spec.get("egress") or []:
        for peer in rule.get("to") or []:
            labels = (peer.get("podSelector") or {}).get("matchLabels")
            for pod in _matching(labels, all_) if labels and rule.get("ports") else []:
                ports = {
                    entry["containerPort"]
                    for container in pod["spec"]["containers"]
                    for entry in container.get("ports") or []
                }
                for port in rule["ports"]:
                    if port["port"] not in ports:
                        yield f"opens port {port['port']} to pods that have {sorted(ports)}"


def _components(selector: Manifest) -> Iterator[str]:
    name = "app.kubernetes.io/component"
    if name in (selector.get("matchLabels") or {}):
        yield selector["matchLabels"][name]
    for expression in selector.get("matchExpressions") or []:
        if expression["key"] == name:
            yield from expression["values"]


def _matching(labels: dict[str, str], all_: list[Manifest]) -> list[Manifest]:
    return [pod for pod in pods(all_) if labels.items() <= _labels(pod).items()]


def _labels(pod: Manifest) -> dict[str, str]:
    found: dict[str, str] = (pod.get("metadata") or {}).get("labels") or {}
    return found


def _named(kind: str, name: str | None, all_: list[Manifest]) -> list[Manifest]:
    return [manifest for manifest in all_ if manifest["kind"] == kind and manifest["metadata"]["name"] == name]


def _key(kind: str, name: str, key: str | None, all_: list[Manifest]) -> Iterator[str]:
    found = _named(kind, name, all_)
    if not found:
        yield f"{kind} {name} does not exist"
    elif key is not None and key not in (found[0].get("data") or {}) | (found[0].get("stringData") or {}):
        yield f"{kind} {name} has no key {key}"


def main(overlays: list[str]) -> None:
    """Print what is wrong with each overlay; exit code 1 when anything is."""
    bad = 0
    for overlay in overlays or OVERLAYS:
        manifests = build(overlay)
        found = problems(manifests)
        bad += len(found)
        for problem in found:
            print(f"{overlay}: {problem}")
        print(f"{overlay}: {len(manifests)} manifests, {len(found)} problems")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
