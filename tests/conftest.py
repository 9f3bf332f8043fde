"""Fixtures of all tests, named after the stages of a life cycle: a containerd that runs, a client, a running container.

`--containerd=1.6,1.7,1.7-grpc,2.1,2.4` runs every test that uses containerd against each of these versions (and once
with shims that speak gRPC); without it they use 2.1, and those marked `every_containerd` all of them. `--start=boot`
has every VM boot its own kernel, `--hypervisor=cloud-hypervisor` makes it one of Cloud Hypervisor's.
"""

import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from msgspec.structs import asdict
from pymicro.shim.config import Timeouts
from pymicro.shim.hypervisor import registry

from tests.framework.containerd import REPOSITORY, USUAL, VERSIONS, Containerd, claimed_directory
from tests.framework.ctr import PYMICRO, Container, Ctr
from tests.framework.golang import GoMissing
from tests.framework.leftovers import Leftovers
from tests.framework.pod import Pod, SharedPod
from tests.framework.settings import dev_paths
from tests.framework.waiting import SLOWER, seconds

# as the shim has it; gRPC reads it when it is imported, and would meddle with every fork of this process
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

LONGEST = 600.0
"""Seconds that slowness makes of a test's limit at most: what hangs shall be named before the whole run is ended."""

# a time limit for each example fails where the machine has other things to do; each test has one of its own
hypothesis.settings.register_profile("busy machine", deadline=None)
hypothesis.settings.load_profile("busy machine")

LOG_SECTION = pytest.StashKey[tuple[Containerd, int]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--containerd", default="", help="versions to test against: 1.6,1.7,1.7-grpc,2.1,2.4 (default: 2.1)"
    )
    parser.addoption("--runtime", default=PYMICRO, help="the runtime under test; io.containerd.runc.v2 tests the tests")
    parser.addoption(
        "--start",
        choices=("snapshot", "boot"),
        default="snapshot",
        help="vm.start, unless a test chooses its own",
    )
    parser.addoption(
        "--hypervisor", choices=registry.NAMES, default="qemu", help="vm.hypervisor, unless a test chooses its own"
    )
    parser.addoption("--clones", type=int, default=1000, help="how many clones of one template the slow lane compares")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "every_containerd: runs against each supported containerd version")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "e2e" in item.path.relative_to(REPOSITORY).parts:
            item.add_marker("e2e")
        if SLOWER != 1:
            marker = item.get_closest_marker("timeout")
            usual = marker.args[0] if marker else item.config.getini("timeout")
            item.add_marker(pytest.mark.timeout(max(float(usual), min(seconds(float(usual)), LONGEST))), append=False)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "containerd" in metafunc.fixturenames:
        chosen = [version for version in metafunc.config.getoption("--containerd").split(",") if version]
        everywhere = metafunc.definition.get_closest_marker("every_containerd") is not None
        versions = chosen or (list(VERSIONS) if everywhere else [USUAL])
        metafunc.parametrize("containerd", versions, indirect=True, scope="session")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Add to a failure's report what containerd and the shims logged during the test."""
    report = yield
    if report.failed and LOG_SECTION in item.stash:  # type: ignore[attr-defined]  # the hook yields a TestReport
        containerd, start = item.stash[LOG_SECTION]
        report.sections.append(("containerd's log", containerd.log.read_text(errors="replace")[start:]))  # type: ignore[attr-defined]  # as above
    return report


@pytest.fixture(scope="session")
def artefacts() -> dict[str, str]:
    """Return the paths of kernel, image and tools, built once if need be; that failing is one failure for all tests."""
    return dev_paths()


def patient_timeouts() -> dict[str, float]:
    """Return the shim's `[timeouts]` for this host: the defaults, times what it is slower."""
    return {name: seconds(value) for name, value in asdict(Timeouts()).items()}


@pytest.fixture(scope="session")
def containerd(artefacts: dict[str, str], request: pytest.FixtureRequest) -> Iterator[Containerd]:
    """Yield a containerd of our own, started once per version, with the image `localhost/busybox:latest`."""
    if os.geteuid():
        pytest.skip("containerd needs root")
    with claimed_directory(REPOSITORY / "build/test") as directory:
        chosen = {name: request.config.getoption(f"--{name}") for name in ("hypervisor", "start")}
        settings = {"vm": chosen, "timeouts": patient_timeouts()}
        namespace = f"test-{secrets.token_hex(3)}"
        instance = Containerd(request.param, directory, namespace=namespace, settings=settings)
        try:
            instance.start()
            yield instance
        except GoMissing as error:
            pytest.skip(str(error))
        finally:
            instance.stop()


@pytest.fixture(scope="session")
def shared_pod() -> SharedPod:
    """Return the holder of the pod that tests share."""
    return SharedPod()


@pytest.fixture(scope="session")
def pod_until_containerd_ends(containerd: Containerd, shared_pod: SharedPod) -> Iterator[SharedPod]:
    yield shared_pod
    shared_pod.end()


@pytest.fixture
def pod(containerd: Containerd, pod_until_containerd_ends: SharedPod, request: pytest.FixtureRequest) -> Iterator[Pod]:
    """Yield a client whose containers share one VM with other tests' until one asks for `ctr`, to be quick."""
    request.node.stash[LOG_SECTION] = (containerd, containerd.log.stat().st_size)
    shared = pod_until_containerd_ends.take(containerd, request.config.getoption("--runtime"))
    yield shared
    shared.end_containers()


@pytest.fixture
def ctr(containerd: Containerd, shared_pod: SharedPod, request: pytest.FixtureRequest) -> Iterator[Ctr]:
    """Yield a client for one test. Afterwards everything that it started is ended, and nothing may be left of it."""
    shared_pod.end()
    request.node.stash[LOG_SECTION] = (containerd, containerd.log.stat().st_size)
    client = Ctr(containerd, request.config.getoption("--runtime"))
    nothing = Leftovers(containerd, client.ids)
    yield client
    client.clean_up()
    nothing.check()


@pytest.fixture
def only_our_runtime(request: pytest.FixtureRequest) -> None:
    """Skip where another runtime is tested: what the test looks at is pymicro's own."""
    if request.config.getoption("--runtime") != PYMICRO:
        pytest.skip("these tests know how pymicro is built")


@pytest.fixture
def only_qemu(request: pytest.FixtureRequest) -> None:
    """Skip where another VMM is tested: the test looks at what is its own, or at the kernel's vsock."""
    if request.config.getoption("--hypervisor") != "qemu":
        pytest.skip("these tests know how pymicro runs QEMU")


@pytest.fixture
def leftovers(ctr: Ctr) -> Leftovers:
    """Return what the test has left on the host so far: `leftovers.check()` fails unless it is nothing."""
    return Leftovers(ctr.containerd, ctr.ids)


@pytest.fixture
def daemon(ctr: Ctr) -> Iterator[Containerd]:
    """Yield the containerd; it runs again afterwards, whatever the test has done to it."""
    yield ctr.containerd
    if not ctr.containerd.responds():
        ctr.containerd.crash()
        ctr.containerd.revive()


@pytest.fixture
def container_running(ctr: Ctr) -> Container:
    """Return a container that sleeps, without stdio."""
    return ctr.start("sleep", "100000")


@pytest.fixture
def templates(ctr: Ctr) -> Iterator[Path]:
    """Yield an empty directory for templates, so that the next start makes one."""
    with tempfile.TemporaryDirectory(prefix="pymicro-test-", dir="/dev/shm") as directory:
        ctr.containerd.write_settings(vm={"start": "snapshot"}, templates={"directory": directory})
        yield Path(directory)
        ctr.containerd.write_settings()
