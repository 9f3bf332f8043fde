"""`pymicroctl template`: make, list and remove the saved VMs that pods start from."""

import asyncio
import logging
import sys
import time

from pymicro.shim.config import Settings, VmSize, load
from pymicro.shim.errors import ShimError
from pymicro.shim.hypervisor import registry
from pymicro.shim.hypervisor.base import Template
from pymicro.shim.ignition import template_store, vm_of_size
from pymicro.shim.spawn import Place
from pymicro.shim.template_builder import Builder
from pymicro.shim.templates import Store


def run(action: str, names: list[str], *, config: str | None, vcpus: int | None, memory_mib: int | None) -> int:
    """Do `action`; return the exit status: 0 done, 1 not, with the reason on stderr."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        settings = load(config)
        store = template_store(settings)
        if action == "build":
            return asyncio.run(_build(settings, vcpus, memory_mib))
        if action == "list":
            _list(store)
        elif action == "rm":
            _remove(store, names)
        else:
            _prune(store)
    except (ShimError, OSError) as error:
        print(f"pymicroctl: {error}", file=sys.stderr)
        return 1
    return 0


def _remove(store: Store, names: list[str]) -> None:
    known = store.names()
    if unknown := [name for name in names if name not in known]:
        raise ShimError(f"there is no template {unknown[0]}; `pymicroctl template list` shows them")
    for name in names:
        store.remove(name)
        print(name)


def _prune(store: Store) -> None:
    for name, why in store.prune(thorough=True).items():
        print(f"{name}  {why}")


async def _build(settings: Settings, vcpus: int | None, memory_mib: int | None) -> int:
    spec = vm_of_size(settings, VmSize(vcpus or settings.vm.vcpus, memory_mib or settings.vm.memory_mib))
    store = template_store(settings)
    builder = Builder(store, settings.timeouts.hello)
    origin = await builder.origin(spec, registry.hypervisor(settings), Place(store.directory))
    if not isinstance(origin, Template):
        return 1  # the builder has said why
    print(origin.memory.parent.name)
    return 0


def _list(store: Store) -> None:
    print(f"{'TEMPLATE':18}{'CPUS':>5}{'MEMORY':>10}{'HELD':>9}{'AGE':>9}  STATE")
    total = 0
    for name in store.names():
        facts = store.facts(name)
        total += facts.held_bytes
        held = facts.held_bytes >> 20
        age = f"{(time.time() - facts.created_at) / 60:.0f} min" if facts.created_at else "-"
        state = store.condition(name, thorough=True)
        print(f"{name:18}{facts.vcpus:>5}{facts.memory_mib:>6} MiB{held:>5} MiB{age:>9}  {state}")
    print(f"together {total >> 20} MiB, at most {store.most_mib} MiB are kept (templates.most_mib)")
