"""Where packages come from: the Debian mirror, proxies and date checks that the host's own apt uses."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .tools import BuildError, capture

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
INDEX_FORMAT = "$(REPO_URI)|$(LABEL)|$(COMPONENT)"
PASSED_OPTIONS = ("Acquire::http::Proxy", "Acquire::https::Proxy", "Acquire::Check-Valid-Until")
"""What the host's administrator decided about the network holds for the image too, e.g. for a mirror that is behind."""

UNLABELLED = {"debian": "Debian", "debian-security": "Debian-Security"}
"""The label to assume from the last word of an address, where apt does not know it yet."""


@dataclass(frozen=True)
class Mirror:
    """Base addresses of the Debian archive and, where the host has one, of its security archive."""

    main: str
    security: str | None

    def sources(self, suite: str) -> list[str]:
        """Return the apt lines for `suite`, signed by nothing but Debian's archive keyring."""
        lines = [f"deb [signed-by={KEYRING}] {self.main} {suite} main"]
        if self.security:
            lines.append(f"deb [signed-by={KEYRING}] {self.security} {suite}-security main")
        return lines


def find() -> Mirror:
    """Return the mirror from $DEBIAN_MIRROR (and $DEBIAN_SECURITY_MIRROR), else from apt. Raises BuildError."""
    if not KEYRING.is_file():
        raise BuildError(f"{KEYRING} is missing: apt-get install debian-archive-keyring")
    chosen = os.environ.get("DEBIAN_MIRROR")
    if chosen:
        return Mirror(chosen, os.environ.get("DEBIAN_SECURITY_MIRROR") or None)
    return from_index(capture(["apt-get", "indextargets", "--format", INDEX_FORMAT, "Created-By: Packages"]))


def from_index(listing: str) -> Mirror:
    """Return the mirror that an `apt-get indextargets` listing in INDEX_FORMAT shows. Raises BuildError."""
    found: dict[str, str] = {}
    for line in listing.splitlines():
        uri, label, component = line.split("|")
        # The label comes from the archive itself; it is empty until the host has run `apt-get update`.
        archive = label or UNLABELLED.get(uri.rstrip("/").rpartition("/")[2])
        if component == "main" and archive:
            found.setdefault(archive, uri)
    if "Debian" not in found:
        raise BuildError(
            "the host's apt has no Debian archive (no `main` line in its sources): "
            "set DEBIAN_MIRROR to the address of one, and DEBIAN_SECURITY_MIRROR to that of the security archive"
        )
    return Mirror(found["Debian"], found.get("Debian-Security"))


def apt_options() -> list[str]:
    """Return the host's apt options that the image's download should follow, as apt.conf lines."""
    dump = subprocess.run(["apt-config", "dump", *PASSED_OPTIONS], capture_output=True, text=True, check=False).stdout
    return [line for line in dump.splitlines() if line.split(" ", 1)[0] in PASSED_OPTIONS]
