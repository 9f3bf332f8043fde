"""The guest image builder's decisions: where packages come from, what is trimmed, what names a cache entry."""

import importlib
import json
import os
import sys
from pathlib import Path

import pytest

BUILDER = Path(__file__).resolve().parents[2] / "rootfs-builder"
sys.path.insert(0, str(BUILDER))
base, cache, image, mirror, tools, trim = (
    importlib.import_module(f"guestimage.{name}") for name in ("base", "cache", "image", "mirror", "tools", "trim")
)

VERSIONS = {"mmdebstrap": "1.3.5", "mkfs.erofs": "1.5"}


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    write(tmp_path / "agent/pymicro/agent/__init__.py")
    write(tmp_path / "agent/pymicro/agent/boot.py", "x = 1\n")
    write(tmp_path / "agent/pymicro/agent/__pycache__/boot.cpython-311.pyc", "stale")
    write(tmp_path / "protos/pymicro/wire/frames.py", "y = 2\n")
    return tmp_path


@pytest.fixture
def base_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "base"
    directory.mkdir()
    cache.write_manifest(directory, {"sha256": "ab", "packages": {"crun": "1.21-1"}})
    return directory


class TestMirror:
    def test_the_hosts_archives_are_used_for_the_image(self) -> None:
        listing = (
            "http://m.example/debian/|Debian|main\n"
            "http://m.example/debian-security/|Debian-Security|main\n"
            "http://m.example/debian/|Debian|contrib\n"
        )
        found = mirror.from_index(listing)
        assert found.sources("trixie") == [
            f"deb [signed-by={mirror.KEYRING}] http://m.example/debian/ trixie main",
            f"deb [signed-by={mirror.KEYRING}] http://m.example/debian-security/ trixie-security main",
        ]

    def test_an_archive_without_a_label_is_known_by_its_address(self) -> None:
        found = mirror.from_index("http://m.example/debian||main\nhttp://m.example/debian-security/||main")
        assert found == mirror.Mirror("http://m.example/debian", "http://m.example/debian-security/")

    def test_somebody_elses_repository_is_not_taken_for_debian(self) -> None:
        listing = "https://browser.example/linux/||main\nhttps://engine.example/|Engine|main\n"
        with pytest.raises(tools.BuildError, match="set DEBIAN_MIRROR"):
            mirror.from_index(listing)

    def test_a_host_without_security_archive_gets_the_main_one_only(self) -> None:
        assert len(mirror.from_index("http://m.example/debian|Debian|main").sources("trixie")) == 1

    @pytest.mark.skipif(not mirror.KEYRING.is_file(), reason="needs Debian's archive keyring")
    def test_the_environment_overrules_apt(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DEBIAN_MIRROR", "http://mine.example/debian")
        monkeypatch.delenv("DEBIAN_SECURITY_MIRROR", raising=False)
        assert mirror.find() == mirror.Mirror("http://mine.example/debian", None)


class TestTrim:
    @pytest.mark.parametrize(
        "path",
        [
            "lib64",
            "usr/bin/python3",
            "usr/bin/python3.13",
            "usr/bin/crun",
            "usr/lib64/ld-linux-x86-64.so.2",
            "usr/lib/python3.13/socket.py",
            "usr/lib/python3.13/json/decoder.py",
            "usr/lib/python3.13/lib-dynload/_ctypes.cpython-313-x86_64-linux-gnu.so",
        ],
    )
    def test_what_the_agent_needs_stays(self, path: str) -> None:
        assert trim.wanted(path)

    @pytest.mark.parametrize(
        "path",
        [
            "usr/bin/dpkg",
            "usr/bin/python3-config",
            "usr/share/doc/crun/copyright",
            "usr/share/locale/de/LC_MESSAGES/dpkg.mo",
            "var/lib/dpkg/status",
            "usr/lib/python3/dist-packages/debpython/version.py",
            "usr/lib/python3.13/test/support/__init__.py",
            "usr/lib/python3.13/ensurepip/__init__.py",
            "usr/lib/python3.13/pydoc.py",
            "usr/lib/python3.13/pydoc_data/topics.py",
            "usr/lib/python3.13/json/__pycache__/decoder.cpython-313.pyc",
            "usr/lib/python3.13/lib-dynload/_ssl.cpython-313-x86_64-linux-gnu.so",
            "usr/lib/python3.13/lib-dynload/_testcapi.cpython-313-x86_64-linux-gnu.so",
        ],
    )
    def test_what_it_does_not_need_goes(self, path: str) -> None:
        assert not trim.wanted(path)

    def test_a_needed_library_stays_with_the_file_that_its_link_names(self, tmp_path: Path) -> None:
        libraries = tmp_path / "usr/lib/x86_64-linux-gnu"
        write(tmp_path / "usr/bin/crun")
        write(libraries / "libcap.so.2.75")
        (libraries / "libcap.so.2").symlink_to("libcap.so.2.75")
        write(libraries / "libssl.so.3")
        write(tmp_path / "usr/share/man/man1/crun.1")
        trim.trim(tmp_path, {"usr/bin/crun": ["usr/lib/x86_64-linux-gnu/libcap.so.2"]}.__getitem__)
        left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if not path.is_dir())
        assert left == [
            "usr/bin/crun",
            "usr/lib/x86_64-linux-gnu/libcap.so.2",
            "usr/lib/x86_64-linux-gnu/libcap.so.2.75",
        ]
        assert not (tmp_path / "usr/share").exists()


class TestKeys:
    def test_sources_are_those_of_agent_wire_and_init(self, repository: Path) -> None:
        assert [source.path for source in image.agent_sources(repository)] == [
            "init.py",
            "pymicro/agent/__init__.py",
            "pymicro/agent/boot.py",
            "pymicro/wire/frames.py",
        ]

    def test_a_change_of_the_agent_makes_another_image_on_the_same_base(self, repository: Path, base_dir: Path) -> None:
        base_key = base.key(VERSIONS)
        before = image.key(image.agent_sources(repository), VERSIONS, base_dir)
        assert image.key(image.agent_sources(repository), VERSIONS, base_dir) == before
        write(repository / "agent/pymicro/agent/boot.py", "x = 2\n")
        assert image.key(image.agent_sources(repository), VERSIONS, base_dir) != before
        assert base.key(VERSIONS) == base_key

    def test_moving_a_module_makes_another_image(self, repository: Path, base_dir: Path) -> None:
        before = image.key(image.agent_sources(repository), VERSIONS, base_dir)
        (repository / "agent/pymicro/agent/boot.py").rename(repository / "agent/pymicro/agent/start.py")
        assert image.key(image.agent_sources(repository), VERSIONS, base_dir) != before

    def test_newer_packages_make_another_image(self, repository: Path, base_dir: Path) -> None:
        before = image.key(image.agent_sources(repository), VERSIONS, base_dir)
        cache.write_manifest(base_dir, {"sha256": "cd"})
        assert image.key(image.agent_sources(repository), VERSIONS, base_dir) != before

    def test_each_tools_version_is_in_the_key_of_what_it_makes(self, repository: Path, base_dir: Path) -> None:
        sources = image.agent_sources(repository)
        newer = {"mmdebstrap": "1.5.7", "mkfs.erofs": "1.8.6"}
        assert base.key(newer) != base.key(VERSIONS)
        assert image.key(sources, newer, base_dir) != image.key(sources, VERSIONS, base_dir)


class TestCache:
    def test_the_directory_follows_the_environment(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PYMICRO_CACHE", str(tmp_path / "mine"))
        assert cache.directory() == tmp_path / "mine"
        monkeypatch.delenv("PYMICRO_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cache.directory() == tmp_path / "pymicro"

    def test_a_finished_artefact_is_built_once(self, tmp_path: Path) -> None:
        built: list[Path] = []

        def build(into: Path) -> None:
            built.append(into)
            cache.write_manifest(into, {"n": len(built)})

        with cache.lock(tmp_path):
            first = cache.ensure(tmp_path, "image-1", build)
            assert cache.ensure(tmp_path, "image-1", build) == first
            assert cache.read_manifest(first) == {"n": 1}
            cache.ensure(tmp_path, "image-1", build, renew=True)
        assert cache.read_manifest(first) == {"n": 2}
        assert sorted(path.name for path in tmp_path.iterdir()) == [cache.LOCK, "image-1"]

    def test_a_failed_build_leaves_nothing(self, tmp_path: Path) -> None:
        def build(into: Path) -> None:
            write(into / "half")
            raise tools.BuildError("no network")

        with cache.lock(tmp_path), pytest.raises(tools.BuildError):
            cache.ensure(tmp_path, "image-1", build)
        assert [path.name for path in tmp_path.iterdir()] == [cache.LOCK]

    def test_what_a_dead_builder_left_is_swept_away(self, tmp_path: Path) -> None:
        write(tmp_path / f"{cache.TEMPORARY}dead/new/tree/file")
        write(tmp_path / "image-1/manifest.json", "{}")
        with cache.lock(tmp_path):
            cache.sweep(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [cache.LOCK, "image-1"]

    def test_a_manifest_that_is_no_object_is_refused(self, tmp_path: Path) -> None:
        write(tmp_path / "manifest.json", json.dumps(["image.erofs"]))
        with pytest.raises(TypeError, match="list instead of an object"):
            cache.read_manifest(tmp_path)


def test_a_missing_tool_is_reported_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(tools.BuildError, match=r"apt-get install .*erofs-utils.*mmdebstrap"):
        tools.versions()


def test_a_failing_command_is_reported_with_its_message() -> None:
    with pytest.raises(tools.BuildError, match="exit code 3: out of luck"):
        tools.capture(["sh", "-c", "echo out of luck >&2; exit 3"])
