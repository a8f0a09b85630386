"""The Pod Security Standard `restricted`, rule by rule, over pod specs as plain values.

https://kubernetes.io/docs/concepts/security/pod-security-standards/ (restricted, with the baseline that it includes).
"""

from collections.abc import Iterator
from typing import Any

VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "image",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
SELINUX_TYPES = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
SAFE_SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_wmem",
}
APPARMOR = "container.apparmor.security.beta.kubernetes.io/"


def violations(spec: dict[str, Any], annotations: dict[str, str] | None = None) -> Iterator[str]:
    """What of a pod the standard forbids, a sentence each.

    Args:
        spec: a PodSpec.
        annotations: of the pod.
    """
    pod = spec.get("securityContext") or {}
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(key):
            yield f"{key} is set"
    for volume in spec.get("volumes") or []:
        for kind in volume.keys() - {"name"} - VOLUMES:
            yield f"volume {volume['name']} is a {kind}"
    for sysctl in pod.get("sysctls") or []:
        if sysctl["name"] not in SAFE_SYSCTLS:
            yield f"sysctl {sysctl['name']} is not a safe one"
    for key, value in (annotations or {}).items():
        if key.startswith(APPARMOR) and value != "runtime/default" and not value.startswith("localhost/"):
            yield f"{key} is {value}"
    yield from _shared(pod, "the pod")
    for kind in ("initContainers", "containers", "ephemeralContainers"):
        for container in spec.get(kind) or []:
            yield from _container(container, pod)


def _shared(context: dict[str, Any], where: str) -> Iterator[str]:
    """Rules about fields that a pod and a container both have."""
    if (context.get("windowsOptions") or {}).get("hostProcess"):
        yield f"{where}: hostProcess is set"
    selinux = context.get("seLinuxOptions") or {}
    if selinux.get("type", "") not in SELINUX_TYPES or selinux.get("user") or selinux.get("role"):
        yield f"{where}: seLinuxOptions are {selinux}"
    if (context.get("appArmorProfile") or {}).get("type", "RuntimeDefault") not in ("RuntimeDefault", "Localhost"):
        yield f"{where}: appArmorProfile is unconfined"
    if context.get("runAsUser") == 0:
        yield f"{where}: runAsUser is 0"
    seccomp = (context.get("seccompProfile") or {}).get("type")
    if seccomp is not None and seccomp not in ("RuntimeDefault", "Localhost"):
        yield f"{where}: seccompProfile is {seccomp}"


def _container(container: dict[str, Any], pod: dict[str, Any]) -> Iterator[str]:
    own = container.get("securityContext") or {}
    where = f"container {container['name']}"
    yield from _shared(own, where)
    if own.get("privileged"):
        yield f"{where}: privileged is set"
    if own.get("allowPrivilegeEscalation") is not False:
        yield f"{where}: allowPrivilegeEscalation is not false"
    if own.get("procMount", "Default") != "Default":
        yield f"{where}: procMount is {own['procMount']}"
    capabilities = own.get("capabilities") or {}
    if "ALL" not in (capabilities.get("drop") or []):
        yield f"{where}: capabilities do not drop ALL"
    for name in set(capabilities.get("add") or []) - {"NET_BIND_SERVICE"}:
        yield f"{where}: capability {name} is added"
    if own.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
        yield f"{where}: runAsNonRoot is not true"
    if not (own.get("seccompProfile") or pod.get("seccompProfile")):
        yield f"{where}: no seccompProfile"
    for port in container.get("ports") or []:
        if port.get("hostPort"):
            yield f"{where}: hostPort {port['hostPort']}"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        yield from _probe(container.get(probe) or {}, f"{where}: {probe}")
    for hook in ("postStart", "preStop"):
        yield from _probe((container.get("lifecycle") or {}).get(hook) or {}, f"{where}: {hook}")


def _probe(probe: dict[str, Any], where: str) -> Iterator[str]:
    for kind in ("httpGet", "tcpSocket"):
        if (probe.get(kind) or {}).get("host"):
            yield f"{where} asks the host {probe[kind]['host']}"
