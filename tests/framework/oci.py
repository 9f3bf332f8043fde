"""OCI images as blobs in memory: layers, configs, manifests, indexes, each under its digest.

Field names and media types are those of the OCI image specification 1.1.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Descriptor: TypeAlias = dict[str, object]

INDEX = "application/vnd.oci.image.index.v1+json"


@dataclass(frozen=True, slots=True)
class Blob:
    """Some bytes and what they are."""

    media_type: str
    data: bytes


class Blobs:
    """The content of one or more images: blobs by digest."""

    def __init__(self) -> None:
        self.by_digest: dict[str, Blob] = {}

    def add(self, media_type: str, data: bytes) -> Descriptor:
        """Keep `data` and return what refers to it."""
        digest = digest_of(data)
        self.by_digest[digest] = Blob(media_type, data)
        return {"mediaType": media_type, "digest": digest, "size": len(data)}

    def add_image(
        self, layers: Sequence[bytes], command: Sequence[str], *, architecture: str = "amd64", created_by: str
    ) -> Descriptor:
        """Keep an image for Linux of uncompressed `layers`, the lowest first; return its manifest's descriptor."""
        platform = {"architecture": architecture, "os": "linux"}
        config = {
            **platform,
            "config": {
                "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
                "Cmd": list(command),
            },
            "rootfs": {"type": "layers", "diff_ids": [digest_of(layer) for layer in layers]},
            "history": [{"created_by": created_by} for _ in layers],
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": self.add("application/vnd.oci.image.config.v1+json", as_json(config)),
            "layers": [self.add("application/vnd.oci.image.layer.v1.tar", layer) for layer in layers],
        }
        return {**self.add(str(manifest["mediaType"]), as_json(manifest)), "platform": platform}

    def add_index(self, manifests: Sequence[Descriptor]) -> Descriptor:
        """Keep an index of one image for several platforms; return its descriptor."""
        return self.add(INDEX, as_json({"schemaVersion": 2, "mediaType": INDEX, "manifests": list(manifests)}))


class Layer:
    """A layer in the making: a tar archive of what it adds to a root filesystem. The same additions, the same bytes."""

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._buffer, mode="w")  # noqa: SIM115 - closed by `data`

    def directory(self, name: str, mode: int = 0o755, owner: int = 0) -> None:
        """Add a directory; its parents must have come before. `owner` is user and group."""
        entry = tarfile.TarInfo(name)
        entry.type, entry.mode, entry.uid, entry.gid = tarfile.DIRTYPE, mode, owner, owner
        self._tar.addfile(entry)

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file of root's."""
        add_file(self._tar, name, data, mode)

    def link(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = tarfile.SYMTYPE, target
        self._tar.addfile(entry)

    def data(self) -> bytes:
        """Return the finished archive; nothing can be added afterwards."""
        self._tar.close()
        return self._buffer.getvalue()


def add_file(tar: tarfile.TarFile, name: str, data: bytes, mode: int = 0o644) -> None:
    """Add a regular file of root's to an archive."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), mode
    tar.addfile(entry, io.BytesIO(data))


def digest_of(data: bytes) -> str:
    """Return the name under which a blob is known."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def as_json(value: Mapping[str, object]) -> bytes:
    """Return the one form in which a document is stored here, so that its digest is always the same."""
    return json.dumps(value, sort_keys=True).encode()
