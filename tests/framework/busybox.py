"""The image `localhost/busybox:latest`: an OCI archive made from the host's static busybox, no registry needed."""

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

NAME = "localhost/busybox:latest"
BUSYBOX = Path("/bin/busybox")

PASSWD = (
    "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:app:/home/app:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"
)
GROUP = "root:x:0:\napp:x:1000:\nstaff:x:50:app\nnobody:x:65534:\n"

# Directories with their modes and owners; the parents come first.
DIRECTORIES = (
    *((name, 0o755, 0) for name in ("bin", "dev", "etc", "home", "proc", "sys", "usr", "usr/bin", "var")),
    ("home/app", 0o755, 1000),
    ("root", 0o700, 0),
    ("tmp", 0o1777, 0),
)


def write_archive(archive: Path) -> None:
    """Write the image as an OCI archive that `ctr images import` takes. The same busybox gives the same bytes."""
    layer = _layer()
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": ["sh"]},
        "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
        "history": [{"created_by": "pymicro tests/framework/busybox.py"}],
    }
    blobs: dict[str, bytes] = {}

    def add(kind: str, data: bytes) -> dict[str, object]:
        blobs[_digest(data)] = data
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": _digest(data), "size": len(data)}

    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": add("config.v1+json", _json(config)),
        "layers": [add("layer.v1.tar", layer)],
    }
    entry = add("manifest.v1+json", _json(manifest))
    entry["platform"] = {"architecture": "amd64", "os": "linux"}
    entry["annotations"] = {"io.containerd.image.name": NAME, "org.opencontainers.image.ref.name": "latest"}
    with tarfile.open(archive, "w") as tar:
        _file(tar, "oci-layout", _json({"imageLayoutVersion": "1.0.0"}))
        _file(tar, "index.json", _json({"schemaVersion": 2, "manifests": [entry]}))
        for digest, data in blobs.items():
            _file(tar, f"blobs/{digest.replace(':', '/')}", data)


def write_root(directory: Path) -> None:
    """Unpack the image's root filesystem into `directory`, for a spec that names one."""
    directory.mkdir()
    subprocess.run(["tar", "--extract", "--directory", directory], input=_layer(), check=True)


def _layer() -> bytes:
    applets = subprocess.run([BUSYBOX, "--list"], capture_output=True, text=True, check=True).stdout.split()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, mode, owner in DIRECTORIES:
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode, entry.uid, entry.gid = tarfile.DIRTYPE, mode, owner, owner
            tar.addfile(entry)
        _file(tar, "bin/busybox", BUSYBOX.read_bytes(), mode=0o755)
        for applet in sorted(set(applets) - {"busybox"}):
            entry = tarfile.TarInfo(f"bin/{applet}")
            entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(entry)
        _file(tar, "etc/passwd", PASSWD.encode())
        _file(tar, "etc/group", GROUP.encode())
    return buffer.getvalue()


def _file(tar: tarfile.TarFile, name: str, data: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), mode
    tar.addfile(entry, io.BytesIO(data))


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
