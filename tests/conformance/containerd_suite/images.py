"""The images that the suite pulls, made from the host's busybox: what its tests look for in them, and no more."""

from collections.abc import Sequence

from tests.framework import busybox
from tests.framework.oci import Blobs, Descriptor, Layer

PLATFORMS = ("amd64", "arm64", "s390x")
"""Each image is an index of these; the tests that pull, convert or export one platform of several want others too."""

CREATED_BY = "pymicro tests/conformance/containerd_suite/images.py"

PASSWD = "root:x:0:0:root:/root:/bin/sh\nsys:x:3:3:sys:/dev:/bin/false\nwww-data:x:33:33:www-data:/var/www:/bin/false\n"
GROUP = "root:x:0:\nsys:x:3:\nwww-data:x:33:\n"
"""Users that the tests name, with the numbers that they expect; and 1000 has to be nobody's."""

NETCAT = b"""#!/bin/sh
trap 'exit 143' TERM
/bin/busybox nc "$@" &
wait $!
"""
"""A test ends the container's first process, an nc, by SIGTERM; Debian's leaves that to the kernel, which spares it."""

BASH = b'#!/bin/sh\nexec /bin/sh "$@"\n'


def write_images(blobs: Blobs) -> dict[str, Descriptor]:
    """Put the images into `blobs`; return them by the names under which the suite pulls them."""
    system = [busybox.layer(), _system()]
    layers = {
        "busybox:1.36": system,
        "pause:3.10": [],
        "volume-copy-up:2.2": [*system, _volume("test_dir"), _volume(":colon_prefixed")],
        "volume-ownership:2.1": [*system, _with_setuid_program()],
    }
    return {name: _index(blobs, name, shared) for name, shared in layers.items()}


def _index(blobs: Blobs, name: str, shared: Sequence[bytes]) -> Descriptor:
    """Keep the image for each platform, with a layer of its own: fetching one must not bring the others."""
    manifests = [
        blobs.add_image([*shared, _marked(f"{name} {each}")], ["sh"], architecture=each, created_by=CREATED_BY)
        for each in PLATFORMS
    ]
    return blobs.add_index(manifests)


def _marked(text: str) -> bytes:
    layer = Layer()
    layer.file("made-for", f"{text}\n".encode())
    return layer.data()


def _system() -> bytes:
    """Return what busybox's layer lacks: users, an nc, and the /run that containerd's default spec mounts over."""
    layer = Layer()
    layer.directory("run")
    layer.file("etc/passwd", PASSWD.encode())
    layer.file("etc/group", GROUP.encode())
    layer.file("bin/nc", NETCAT, mode=0o755)
    return layer.data()


def _volume(name: str) -> bytes:
    layer = Layer()
    layer.directory(name)
    layer.file(f"{name}/test_file", b"test_content\n")
    return layer.data()


def _with_setuid_program() -> bytes:
    """Return what the tests of user namespaces look at: a shell named bash, and a program with the set-user-ID bit."""
    layer = Layer()
    layer.directory("test_dir", owner=65534)
    layer.file("bin/bash", BASH, mode=0o755)
    layer.file("usr/bin/passwd", b"#!/bin/sh\n", mode=0o4755)
    return layer.data()
