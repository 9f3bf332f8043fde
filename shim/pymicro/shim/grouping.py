"""Which sandbox a container belongs to. Imported by `start` and `delete`: no imports of its own."""

SANDBOX_ID = "io.kubernetes.cri.sandbox-id"
CONTAINER_TYPE = "io.kubernetes.cri.container-type"
GROUP = "io.containerd.runc.v2.group"


def joins_running_sandbox(annotations: dict[str, str]) -> bool:
    """Tell whether CRI says that the container's sandbox must run already."""
    return annotations.get(CONTAINER_TYPE) == "container" and bool(annotations.get(SANDBOX_ID))


def sandbox_of(annotations: dict[str, str], container_id: str) -> str:
    """Return the id of the sandbox that a container with these annotations belongs to: its own, or its pod's.

    Raises ValueError for an id with a slash: containerd has checked the containers' ids, nobody the annotations, and
    cgroups are named after it.
    """
    sandbox_id = annotations[SANDBOX_ID] if joins_running_sandbox(annotations) else annotations.get(GROUP)
    if sandbox_id and "/" in sandbox_id:
        raise ValueError(f"the sandbox id {sandbox_id!r} in the annotations is no identifier")
    return sandbox_id or container_id
