"""What the templates' tests share: files to make templates for, a builder over a VMM without VMs, warnings counted."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pymicro.shim.hypervisor.base import Boot, Origin, Template, VmSpec
from pymicro.shim.hypervisor.fake import FakeHypervisor
from pymicro.shim.spawn import Place
from pymicro.shim.template_builder import Builder
from pymicro.shim.templates import Store, key


def fill(mib: int) -> "Filler":
    """Return what a FakeHypervisor's `spoil` can be, so that its guests touch `mib` MiB of their RAM."""
    return Filler(mib)


@dataclass
class Filler:
    """Writes into the RAM of every VM that boots to be saved."""

    mib: int

    def __call__(self, origin: Origin) -> None:
        if isinstance(origin, Boot) and origin.memory:
            with origin.memory.open("r+b") as file:
                file.seek(64 * 1024)
                file.write(b"touched " * (self.mib << 17))


@dataclass
class Bench:
    """A directory with a kernel, an image and a VMM, and a store beside them."""

    spec: VmSpec
    store: Store
    place: Place
    hypervisor: FakeHypervisor
    timeout: float = 2
    wait: bool = True

    async def origin(self, spec: VmSpec | None = None) -> Origin:
        """Return what the next start of `spec` goes on from."""
        builder = Builder(self.store, self.timeout, self.wait, rest=0)
        return await builder.origin(spec or self.spec, self.hypervisor, self.place)

    async def template(self, spec: VmSpec | None = None) -> Template:
        origin = await self.origin(spec)
        assert isinstance(origin, Template), "it boots cold"
        return origin

    @property
    def name(self) -> str:
        return key(self.spec, self.hypervisor)

    @property
    def where(self) -> Path:
        """The directory of the template for `spec`."""
        return self.store.directory / self.name

    def left(self) -> list[str]:
        """Return all that lies in the store."""
        return sorted(path.name for path in self.store.directory.iterdir())


def bench_in(directory: Path, *, most: int = 2, most_mib: int = 64) -> Bench:
    """Return a bench; each VM has 4 MiB, of which its guest touches one."""
    for name in ("kernel", "image", "vmm"):
        (directory / name).write_text(name)
    spec = VmSpec(str(directory / "vmm"), directory / "kernel", directory / "image", 1, 4, "tcg")
    hypervisor = FakeHypervisor()
    hypervisor.spoil = fill(1)
    return Bench(spec, Store(directory / "templates", most, most_mib), Place(directory), hypervisor)


@contextmanager
def warnings_said() -> Iterator[list[str]]:
    """Yield the list of all warnings of the shim, as they come."""
    said: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler = Handler(logging.WARNING)
    logging.getLogger("pymicro").addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger("pymicro").removeHandler(handler)
