"""The image `localhost/busybox:latest`: an OCI archive made from the host's static busybox, no registry needed."""

import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

from tests.framework.oci import Blobs, Layer, add_file, as_json

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


def write_archive(archive: Path, name: str = NAME, above: Sequence[bytes] = ()) -> None:
    """Write the image, with layers `above` its own, as an OCI archive that `ctr images import` takes. The same busybox
    gives the same bytes.
    """
    blobs = Blobs()
    entry = blobs.add_image([layer(), *above], ["sh"], created_by="pymicro tests/framework/busybox.py")
    entry["annotations"] = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": "latest"}
    with tarfile.open(archive, "w") as tar:
        add_file(tar, "oci-layout", as_json({"imageLayoutVersion": "1.0.0"}))
        add_file(tar, "index.json", as_json({"schemaVersion": 2, "manifests": [entry]}))
        for digest, blob in blobs.by_digest.items():
            add_file(tar, f"blobs/{digest.replace(':', '/')}", blob.data)


def write_root(directory: Path) -> None:
    """Unpack the image's root filesystem into `directory`, for a spec that names one."""
    directory.mkdir()
    subprocess.run(["tar", "--extract", "--directory", directory], input=layer(), check=True)


def layer() -> bytes:
    """Return a root filesystem's tar archive: busybox, a link for each of its applets, users and groups."""
    applets = subprocess.run([BUSYBOX, "--list"], capture_output=True, text=True, check=True).stdout.split()
    found = Layer()
    for name, mode, owner in DIRECTORIES:
        found.directory(name, mode, owner)
    found.file("bin/busybox", BUSYBOX.read_bytes(), mode=0o755)
    for applet in sorted(set(applets) - {"busybox"}):
        found.link(f"bin/{applet}", "busybox")
    found.file("etc/passwd", PASSWD.encode())
    found.file("etc/group", GROUP.encode())
    return found.data()
