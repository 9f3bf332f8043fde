#!/usr/bin/python3
"""Build the guest image: Debian's Python and crun plus the agent, as one reproducible read-only erofs file.

Two cached layers, so that a change of the agent does not download Debian again:
`base-<key>` holds the trimmed Debian tree as a tar file, `image-<key>` the finished image and its manifest.
"""

import argparse
import os
import sys
from contextlib import suppress
from pathlib import Path

from guestimage import base, cache, image, tools
from guestimage.tools import BuildError

REPOSITORY = Path(__file__).resolve().parent.parent


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build pymicro's guest image, or find it in the cache.")
    parser.add_argument("--update", action="store_true", help="fetch the newest Debian packages even if cached")
    parser.add_argument("--print-path", action="store_true", help="print the artefact directory on the last line")
    return parser.parse_args(argv)


def build(update: bool) -> Path:
    """Return the directory that holds image.erofs and manifest.json, building what is missing. Raises BuildError."""
    root = cache.directory()
    sources = image.agent_sources(REPOSITORY)
    versions = tools.versions()
    base_name = f"base-{base.key(versions)}"
    if not update:
        with suppress(FileNotFoundError):  # no base layer yet, or one that is being renewed just now
            found = cache.published(root, image_name(sources, versions, root / base_name))
            if found:
                return found
    if os.geteuid() != 0:
        raise BuildError("building the guest image needs root (mmdebstrap, chroot): run it with sudo")
    with cache.lock(root):
        cache.sweep(root)
        base_dir = build_base(root, base_name, versions, update)
        name = image_name(sources, versions, base_dir)
        return cache.ensure(root, name, lambda into: image.build(into, sources, versions, base_dir))


def image_name(sources: list[image.Source], versions: dict[str, str], base_dir: Path) -> str:
    return f"image-{image.key(sources, versions, base_dir)}"


def build_base(root: Path, name: str, versions: dict[str, str], update: bool) -> Path:
    """Return the base layer's directory; with `update`, made anew, and say which packages that changed."""
    before = base.packages(root / name) if cache.published(root, name) else {}
    base_dir = cache.ensure(root, name, lambda into: base.build(into, versions), renew=update)
    if before:
        after = base.packages(base_dir)
        for package in sorted({*before, *after}):
            if before.get(package) != after.get(package):
                tools.progress(f"{package}: {before.get(package, 'absent')} -> {after.get(package, 'absent')}")
    return base_dir


def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    os.umask(0o022)  # the caller's would show in the image
    os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"  # a plain `su` leaves these out
    try:
        directory = build(arguments.update)
    except KeyboardInterrupt:
        return 130
    except (BuildError, OSError) as error:
        print(f"rootfs: {error}", file=sys.stderr)
        return 1
    tools.progress(f"guest image ready: {directory}")
    if arguments.print_path:
        print(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
