"""What `-info` claims is what the guest's crun says of itself, as far as the shim lets it through."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pymicro.shim.features import FEATURES

pytestmark = [
    pytest.mark.vm,
    pytest.mark.skipif(os.geteuid() != 0, reason="to mount an image needs root"),
    pytest.mark.skipif(not shutil.which("unshare"), reason="needs util-linux"),
]

ASK = """
set -e
mount -t erofs -o loop,ro "$1" "$2"
mount -t proc proc "$2/proc"
exec chroot "$2" crun features
"""


@pytest.fixture(scope="module")
def of_crun(artefacts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:  # JSON
    """Return what the crun of the guest's image says of itself; its mounts are gone with the process."""
    mounted = tmp_path_factory.mktemp("image")
    words = ["unshare", "--mount", "sh", "-c", ASK, "sh", artefacts["image"], str(mounted)]
    said: dict[str, Any] = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
    return said


def test_nothing_is_claimed_that_crun_cannot(of_crun: dict[str, Any]) -> None:
    ours, theirs = FEATURES["linux"], of_crun["linux"]
    assert set(FEATURES["hooks"]) == set(of_crun["hooks"])
    assert set(FEATURES["mountOptions"]) <= set(of_crun["mountOptions"])
    assert set(ours["namespaces"]) <= set(theirs["namespaces"])
    assert set(ours["capabilities"]) == set(theirs["capabilities"])
    assert set(ours["seccomp"]["actions"]) <= set(theirs["seccomp"]["actions"])
    assert set(ours["seccomp"]["operators"]) == set(theirs["seccomp"]["operators"])


def test_what_crun_can_and_we_do_not_claim_is_known(of_crun: dict[str, Any]) -> None:
    """An image with a newer crun may bring more: then it is time to look at features.py."""
    ours, theirs = FEATURES["linux"], of_crun["linux"]
    without = {"idmap", "shared", "rshared", "slave", "rslave"}
    assert set(of_crun["mountOptions"]) - set(FEATURES["mountOptions"]) == without
    assert set(theirs["seccomp"]["actions"]) - set(ours["seccomp"]["actions"]) == {"SCMP_ACT_NOTIFY"}
    assert set(theirs["namespaces"]) == set(ours["namespaces"])


def test_the_manifests_name_the_guests_parts(artefacts: dict[str, str], of_crun: dict[str, Any]) -> None:
    from pymicro.shim import host

    image, kernel = (host.find_manifest(Path(artefacts[name])) for name in ("image", "kernel"))
    assert image
    assert image.crun.startswith(of_crun["annotations"]["run.oci.crun.version"])
    assert kernel
    assert kernel.release.endswith("-pymicro")
