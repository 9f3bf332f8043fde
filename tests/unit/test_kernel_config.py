"""The guest kernel's fragments and the program that builds from them; nothing is compiled here."""

import importlib.util
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "kernel-config"
BUILD = FOLDER / "build.py"
FRAGMENTS = sorted(FOLDER.glob("*.config"))
PYTHON = "/usr/bin/python3"


def load(name: str) -> ModuleType:
    """Import a module of kernel-config/, which is no package: its programs run before anything is installed."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


fragments = load("kernel_fragments")
cache = load("kernel_cache")
image = load("kernel_image")
load("kernel_process")
source = load("kernel_source")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Make a kernel source tree of two options."""
    tree = tmp_path / "linux"
    (tree / "net").mkdir(parents=True)
    (tree / "Kbuild").touch()
    (tree / "net/Kconfig").write_text(
        "menuconfig NET\n\tbool\n\nconfig VETH\n\ttristate\n\tdepends on NET\n\tdepends on PROC_FS\n"
        "\thelp\n\t  Depends on nothing you know of.\n"
    )
    return tree


def wanted(text: str) -> dict[str, Any]:  # Any: an Option, whose class is loaded by path
    merged: dict[str, Any] = fragments.merge(fragments.parse(text, "some.config"))
    return merged


# The fragments of the repository


@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda path: path.name)
def test_fragment_parses_and_says_what_it_is_for(path: Path) -> None:
    assert fragments.parse(path.read_text(), path.name)
    assert path.read_text().startswith("# ")


def test_fragments_do_not_contradict_each_other() -> None:
    assert len(fragments.read(FRAGMENTS)) > 100


def test_no_option_is_asked_for_in_two_places() -> None:
    names = [option.name for path in FRAGMENTS for option in fragments.parse(path.read_text(), path.name)]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize(
    "name",
    ["CGROUP_BPF", "SECCOMP_FILTER", "OVERLAY_FS", "EROFS_FS", "VIRTIO_FS", "VIRTIO_VSOCKETS", "HOTPLUG_PCI_ACPI",
     "VIRTIO_MMIO_CMDLINE_DEVICES", "PVH", "KVM_GUEST", "PTP_1588_CLOCK_KVM", "NFT_COMPAT", "USER_NS"],
)  # fmt: skip
def test_fragments_ask_for_what_the_project_stands_on(name: str) -> None:
    assert fragments.read(FRAGMENTS)[f"CONFIG_{name}"].value == "y"


# Reading fragments


def test_parse_understands_strings_numbers_and_the_note() -> None:
    options = wanted('CONFIG_LOCALVERSION="-a b"\nCONFIG_NR_CPUS=64\n\n# why\nCONFIG_NEW=y  # if known\n')
    assert [(str(option), option.if_known) for option in options.values()] == [
        ('CONFIG_LOCALVERSION="-a b" (some.config:1)', False),
        ("CONFIG_NEW=y (some.config:5)", True),
        ("CONFIG_NR_CPUS=64 (some.config:2)", False),
    ]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("VETH=y", "expected CONFIG_NAME=value"),
        ("CONFIG_VETH", "expected CONFIG_NAME=value"),
        ("# fine\nCONFIG_VETH=y # pairs", "comments go above it"),
        ("CONFIG_VETH=m", "no modules"),
    ],
)
def test_parse_names_file_and_line_of_a_mistake(line: str, complaint: str) -> None:
    with pytest.raises(fragments.FragmentError, match=complaint) as error:
        fragments.parse(line, "some.config")
    assert f"some.config:{len(line.splitlines())}" in str(error.value)


def test_two_values_for_an_option_are_refused_naming_both_places() -> None:
    with pytest.raises(fragments.FragmentError, match=r"CONFIG_A=n \(some.config:2\).*CONFIG_A=y \(some.config:1\)"):
        wanted("CONFIG_A=y\nCONFIG_A=n\n")


# The check of a finished .config


def test_check_is_content_with_a_config_that_has_everything(tree: Path) -> None:
    final = fragments.parse_dot_config("CONFIG_NET=y\nCONFIG_HZ=100\n# CONFIG_VETH is not set\n")
    symbols = fragments.known_symbols(tree)
    assert fragments.check(wanted("CONFIG_NET=y\nCONFIG_HZ=100\nCONFIG_VETH=n\nCONFIG_OLD=n\n"), final, symbols) == []


def test_check_names_a_missing_option_its_value_and_its_conditions(tree: Path) -> None:
    final = fragments.parse_dot_config("CONFIG_NET=y\n# CONFIG_VETH is not set\n")
    problems = fragments.check(wanted("CONFIG_VETH=y"), final, fragments.known_symbols(tree))
    assert problems == [
        "CONFIG_VETH=y (some.config:1): it is n in the finished .config; net/Kconfig wants NET and PROC_FS"
    ]


def test_check_notices_an_option_that_is_on_against_the_wish(tree: Path) -> None:
    problems = fragments.check(wanted("CONFIG_NET=n"), {"CONFIG_NET": "y"}, fragments.known_symbols(tree))
    assert len(problems) == 1
    assert "another option selects it" in problems[0]


def test_check_forgives_an_unknown_option_only_where_the_fragment_says_so(tree: Path) -> None:
    symbols = fragments.known_symbols(tree)
    assert fragments.check(wanted("CONFIG_FUTURE=y  # if known"), {}, symbols) == []
    assert "no such option" in fragments.check(wanted("CONFIG_FUTURE=y"), {}, symbols)[0]
    assert fragments.check(wanted("CONFIG_VETH=y  # if known"), {}, symbols) != []


# The key


def key_of_file(path: Path) -> object:
    return cache.key_of({"options": fragments.as_config(fragments.read([path]))})


def test_key_follows_the_options_and_nothing_else_of_a_fragment(tmp_path: Path) -> None:
    path = tmp_path / "a.config"
    path.write_text("CONFIG_A=y\nCONFIG_B=y\n")
    first = key_of_file(path)
    os.utime(path, (1, 1))
    assert key_of_file(path) == first
    path.write_text("# a new comment, another order\nCONFIG_B=y\nCONFIG_A=y\n")
    assert key_of_file(path) == first
    path.write_text("CONFIG_A=y\nCONFIG_B=n\n")
    assert key_of_file(path) != first


def test_identity_of_a_tarball_is_its_content(tmp_path: Path) -> None:
    path = tmp_path / "linux.tar.xz"
    path.write_bytes(b"one")
    first = source.identity(path)
    os.utime(path, (1, 1))
    assert source.identity(path) == first
    path.write_bytes(b"two")
    assert source.identity(path) != first


def test_identity_of_a_tree_changes_with_an_edit(tree: Path) -> None:
    first = source.identity(tree)
    assert source.identity(tree) == first
    (tree / "Kbuild").write_text("# edited\n")
    assert source.identity(tree) != first


def test_a_source_that_is_none_is_refused_with_a_remedy(tmp_path: Path, tree: Path) -> None:
    assert source.locate({"KERNEL_SOURCE": str(tree)}) == tree
    with pytest.raises(source.SourceError, match="neither a kernel source tree nor a tarball"):
        source.locate({"KERNEL_SOURCE": str(tmp_path)})


def test_a_tree_that_was_built_in_is_refused(tree: Path, tmp_path: Path) -> None:
    (tree / ".config").touch()
    with pytest.raises(source.SourceError, match="make mrproper"):
        source.unpack(tree, tmp_path)


# The cache


@pytest.mark.parametrize(
    ("environ", "root"),
    [
        ({"HOME": "/h"}, "/h/.cache/pymicro"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "/x"}, "/x/pymicro"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "/x", "PYMICRO_CACHE": "/p"}, "/p"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "", "PYMICRO_CACHE": ""}, "/h/.cache/pymicro"),
    ],
)
def test_cache_root(environ: dict[str, str], root: str) -> None:
    assert cache.cache_root(environ) == Path(root)


def test_a_kernel_is_found_once_it_is_published(tmp_path: Path) -> None:
    assert cache.find(tmp_path, "k") is None
    (tmp_path / "kernel-k").mkdir()
    assert cache.find(tmp_path, "k") is None, "half a kernel is none"
    with cache.only_builder(tmp_path), cache.scratch(tmp_path) as scratch:
        files = scratch / "files"
        files.mkdir()
        (files / "manifest.json").write_text("{}")
        place = cache.publish(files, tmp_path, "k")
    assert cache.find(tmp_path, "k") == place == tmp_path / "kernel-k"
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["kernel-k"]


def test_what_a_killed_builder_left_is_removed_by_the_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / ".kernel-build-dead/out").mkdir(parents=True)
    with cache.only_builder(tmp_path):
        assert not (tmp_path / ".kernel-build-dead").exists()
    assert "left by a build that was killed" in capsys.readouterr().err


# The vmlinux


def elf(owner: bytes, kind: int) -> bytes:
    """Return a minimal ELF file with one PT_NOTE segment that holds one note."""
    note = (
        struct.pack("<III", len(owner) + 1, 4, kind) + (owner + b"\0").ljust((len(owner) + 4) & ~3, b"\0") + b"\0" * 4
    )
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 2, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    return header + struct.pack("<IIQQQQQQ", 4, 4, 120, 0, 0, len(note), len(note), 4) + note


def test_the_pvh_note_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(elf(b"Xen", 18))
    assert image.boots_by_pvh(path)
    path.write_bytes(elf(b"GNU", 3))
    assert not image.boots_by_pvh(path)
    path.write_bytes(b"\x1f\x8b not a kernel")
    with pytest.raises(ValueError, match="ELF"):
        image.boots_by_pvh(path)


# The program


def run_build(*arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    command = [PYTHON, str(BUILD), *arguments]
    environment = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1", **environ}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_build_without_a_source_says_what_to_do(tmp_path: Path) -> None:
    done = run_build("--print-path", KERNEL_SOURCE=str(tmp_path / "none"), PYMICRO_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 1
    assert done.stdout == ""
    assert "error: KERNEL_SOURCE=" in done.stderr
    assert not (tmp_path / "cache").exists()


def test_build_refuses_contradicting_fragments(tmp_path: Path) -> None:
    extra = tmp_path / "extra.config"
    extra.write_text("CONFIG_VIRTIO_FS=n\n")
    done = run_build("--fragment", str(extra), PYMICRO_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 1
    assert "CONFIG_VIRTIO_FS=n (extra.config:1) contradicts CONFIG_VIRTIO_FS=y (filesystems.config:" in done.stderr


def test_the_program_imports_only_the_standard_library() -> None:
    program = f"import sys; sys.dont_write_bytecode = True; sys.path.insert(0, {str(FOLDER)!r}); import build"
    done = subprocess.run([PYTHON, "-I", "-S", "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
