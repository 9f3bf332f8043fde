"""A registry on loopback that images can be pulled from, by the pull half of the OCI distribution specification 1.1."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.framework.oci import Blob, Blobs, Descriptor


@contextmanager
def serving(blobs: Blobs, images: Mapping[str, Descriptor]) -> Iterator[str]:
    """Serve `images`, named `repository:tag`; yield what stands before these names: `127.0.0.1:<port>`."""
    tags = {name: str(descriptor["digest"]) for name, descriptor in images.items()}

    class Handler(_Handler):
        def found(self, path: str) -> tuple[str, Blob] | None:
            return look_up(path, tags, blobs)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def look_up(path: str, tags: Mapping[str, str], blobs: Blobs) -> tuple[str, Blob] | None:
    """Return digest and blob of `/v2/<repository>/{manifests,blobs}/<tag or digest>`, or None."""
    head, _, reference = path.partition("?")[0].rpartition("/")
    before, _, kind = head.rpartition("/")
    repository = before.removeprefix("/v2/")
    digest = reference if ":" in reference else tags.get(f"{repository}:{reference}", "")
    if kind not in {"manifests", "blobs"} or digest not in blobs.by_digest:
        return None
    return digest, blobs.by_digest[digest]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def found(self, path: str) -> tuple[str, Blob] | None:
        raise NotImplementedError

    def do_GET(self) -> None:
        blob = self._head()
        if blob:
            self.wfile.write(blob.data)

    def do_HEAD(self) -> None:
        self._head()

    def _head(self) -> Blob | None:
        found = self.found(self.path)
        if not found:
            known = self.path == "/v2/"
            self.send_response(HTTPStatus.OK if known else HTTPStatus.NOT_FOUND)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        digest, blob = found
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", blob.media_type)
        self.send_header("Content-Length", str(len(blob.data)))
        self.send_header("Docker-Content-Digest", digest)
        self.end_headers()
        return blob

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - the base class's name
        """Say nothing: what a client asks for is no news."""
