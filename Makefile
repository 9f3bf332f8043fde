# pymicro: everything is done from here; `make help` lists the targets.
#
# What a target needs (Debian packages, a Python environment, kernel and guest image, tools) is made first, once:
# stamps under build/ remember it, and what takes long is cached outside the checkout (PYMICRO_CACHE, by default
# ~/.cache/pymicro) under a key made of its inputs, so a second checkout builds nothing.

# -- what can be chosen on the command line ----------------------------------------------------------------------------
PYTHON     ?= /usr/bin/python3
CONTAINERD ?= 2.1
DEV        ?= build/dev
START      ?= snapshot
HYPERVISOR ?= qemu
LAB_KERNEL ?= bookworm
PREFIX     ?= /opt/pymicro
DESTDIR    ?=
TESTS      ?=
PYTEST     ?=
ARGS       ?=
LIMIT      ?= 1800

# -- names used below --------------------------------------------------------------------------------------------------
# Root is needed for apt and for containers. Another user's sudo keeps that user's cache.
KEPT   := CLOUD_HYPERVISOR,CLOUD_HYPERVISOR_API,DEBIAN_MIRROR,DEBIAN_SECURITY_MIRROR,PYMICRO_CACHE,PYMICRO_DEBIAN_MIRROR,PYMICRO_IMAGE,PYMICRO_KERNEL,XDG_CACHE_HOME,KERNEL_SOURCE,CI
SUDO   := $(if $(filter 0,$(shell id -u)),,sudo --preserve-env=$(KEPT) HOME=$(HOME))
VENV   := .venv/bin
HOST   := $(SUDO) env PYTHONDONTWRITEBYTECODE=1 $(PYTHON)
STAMPS := build/stamps
APT_UPDATE  := $(SUDO) apt-get update
APT_INSTALL := $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends

# Debian 12 has virtiofsd in a package of QEMU, later ones in a package of its own.
DEBIAN   := $(shell . /etc/os-release && echo $$VERSION_ID)
PACKAGES := \
  bc bison busybox-static ca-certificates debian-archive-keyring erofs-utils flex gcc iproute2 libc6-dev libelf-dev \
  linux-source-6.12 make mmdebstrap python3 python3-venv qemu-system-x86 xz-utils \
  $(if $(filter-out 12,$(DEBIAN)),virtiofsd)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run test check unit integration e2e slow kvm-test kvm-lab conformance bench kernel rootfs protos install uninstall up down clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

# -- trying it out -----------------------------------------------------------------------------------------------------
run: ready ## set everything up, run one container in its own VM, and say which kernels host and container have
	@$(HOST) -m tests.framework.dev run --containerd $(CONTAINERD)

up: ready ## start a private containerd in the background (CONTAINERD=1.6|1.7|1.7-grpc|2.1|2.4), to be used after `. build/dev/env`
	@$(HOST) -m tests.framework.dev up --containerd $(CONTAINERD) --directory $(DEV)

down: ## stop it, and whatever an interrupted run or test has left; nothing stays running or mounted
	@$(HOST) -m tests.framework.dev down --directory $(DEV)

# -- testing -----------------------------------------------------------------------------------------------------------
test: ready check $(STAMPS)/go ## run all checks and all tests except the slow ones (PYTEST="-k word" chooses)
	$(SUDO) $(VENV)/pytest -m "not slow" --start=$(START) tests/unit tests/conformance tests/integration tests/e2e $(PYTEST)

check: .venv/.installed ## lint, formatting, types, import rules, generated code
	$(VENV)/ruff check
	$(VENV)/ruff format --check
	$(VENV)/mypy
	$(VENV)/lint-imports
	$(VENV)/python protos/generate.py --check

unit: .venv/.installed $(STAMPS)/go ## run the tests that need neither root nor other programs
	$(VENV)/pytest -m "not vm" tests/unit tests/conformance $(PYTEST)

integration: ready $(STAMPS)/go ## run the tests of the pieces against real QEMU, virtiofsd and containerd
	$(SUDO) $(VENV)/pytest -m "not slow" tests/integration tests/conformance/test_hypervisor.py $(PYTEST)

e2e: ready ## run the tests that start containers through a real containerd (START=boot: without snapshots)
	$(SUDO) $(VENV)/pytest -m "not slow" --start=$(START) tests/e2e $(PYTEST)

slow: ready ## run the tests that take many minutes each (PYTEST="--clones=20" shortens the longest)
	$(SUDO) $(VENV)/pytest -m slow --start=$(START) tests/integration tests/e2e $(PYTEST)

# A command line goes by way of the environment: whatever is quoted in it stays quoted. The lab has no network.
kvm-test: export LAB_COMMAND = $(VENV)/pytest -m "kvm and not slow" --containerd=2.1 --start=$(START) --hypervisor=$(HYPERVISOR) tests/e2e $(PYTEST)
kvm-test: ready ## run the tests marked `kvm` on an emulated host with KVM (HYPERVISOR=cloud-hypervisor, PYTEST="-k word")
	@$(HOST) -m tests.framework.kvmlab --limit $(LIMIT) --kernel $(LAB_KERNEL) -- "$$LAB_COMMAND"

kvm-lab: export LAB_COMMAND = $(ARGS)
kvm-lab: ready ## run a command (ARGS="...") or a shell on that host, for LIMIT seconds at most
	@$(HOST) -m tests.framework.kvmlab --limit $(LIMIT) --kernel $(LAB_KERNEL) -- "$$LAB_COMMAND"

conformance: ready ## run containerd's own client suite with runc and pymicro and compare (TESTS="TestOne TestTwo" ALL=1)
	@$(SUDO) env TESTS="$(TESTS)" ALL="$(ALL)" TEST_LIMIT="$(TEST_LIMIT)" \
	  $(VENV)/python -m tests.conformance.containerd_suite

bench: ready ## measure starts, exec, memory and throughput against runc and the bare QEMU (ROUNDS=2 WAVES=1,5 IDLE=1,5)
	$(SUDO) env $(foreach name,ROUNDS WAVES IDLE MEGABYTES,$(if $($(name)),$(name)=$($(name)))) $(VENV)/python -m tests.bench

# -- building ----------------------------------------------------------------------------------------------------------
kernel: $(STAMPS)/packages ## build the guest kernel, or find it in the cache (KERNEL_SOURCE=dir builds that tree)
	@$(SUDO) $(PYTHON) kernel-config/build.py --print-path

rootfs: $(STAMPS)/packages ## build the guest image, or find it in the cache
	@$(SUDO) $(PYTHON) rootfs-builder/build.py --print-path

protos: .venv/.installed ## generate the protobuf code anew
	$(VENV)/python protos/generate.py

install: ready ## install under /opt/pymicro (PREFIX, DESTDIR), the shim linked from /usr/local/bin
	@$(SUDO) env PYTHONPATH=shim $(PYTHON) -m pymicro.ctl.install install $$($(HOST) -m tests.framework.settings) \
	  --prefix $(PREFIX) --destdir "$(DESTDIR)"

uninstall: ## remove it; the settings file stays unless PURGE=1
	@$(SUDO) env PYTHONPATH=shim $(PYTHON) -m pymicro.ctl.install uninstall --prefix $(PREFIX) --destdir "$(DESTDIR)" \
	  $(if $(PURGE),--purge)

clean: down ## remove what was built here; the cache outside the checkout stays
	$(SUDO) rm -rf build .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find agent protos shim tests -name __pycache__ -prune -exec rm -rf {} +

# -- what the targets rest on ------------------------------------------------------------------------------------------
.PHONY: ready
ready: $(STAMPS)/packages .venv/.installed
	@$(HOST) -m tests.framework.settings >/dev/null

# Only missing packages are installed. Nothing is asked; apt's progress is shown.
$(STAMPS)/packages: Makefile
	@mkdir -p $(STAMPS)
	@missing=$$(for name in $(PACKAGES); do \
	  dpkg-query -W -f '$${db:Status-Status}' $$name 2>/dev/null | grep -qx installed || echo $$name; done); \
	if [ -n "$$missing" ]; then \
	  echo "installing Debian packages:" $$missing; \
	  $(APT_UPDATE) && $(APT_INSTALL) $$missing </dev/null || { \
	    echo "If a package cannot be located: this needs Debian 12 with its security suite, or a later Debian."; exit 1; }; \
	fi
	@touch $@

# Some tests compare with containerd's own code, which is built from source.
$(STAMPS)/go: | $(STAMPS)/packages
	@command -v go >/dev/null || { $(APT_UPDATE) && $(APT_INSTALL) golang-go </dev/null; }
	@touch $@

# The stamp lies in the environment, so that it goes with it.
.venv/.installed: pyproject.toml shim/bin/containerd-shim-pymicro-v1 | $(STAMPS)/packages
	$(PYTHON) -m venv .venv
	$(VENV)/pip install --disable-pip-version-check --quiet --editable '.[dev]'
	@touch $@
