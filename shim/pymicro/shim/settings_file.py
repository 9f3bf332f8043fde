"""Which settings file holds, and its bytes; `config` says what they mean. Imported by `start`: only what is small."""

import os

from pymicro.shim.errors import HostMissing

DEFAULT = "/etc/pymicro/config.toml"
ENVIRONMENT = "PYMICRO_CONFIG"


class SettingsFile:
    """A settings file's path, and what is in it."""

    def __init__(self, path: str, content: bytes) -> None:
        self.path = path
        self.content = content

    def __repr__(self) -> str:
        return f"<SettingsFile {self.path} {len(self.content)} bytes>"


def read(path: str | None = None) -> SettingsFile:
    """Return the file `path`, else the one that PYMICRO_CONFIG names, else DEFAULT, which may be absent: empty then.

    Raises HostMissing when a file that was named is absent, or one cannot be read.
    """
    named = path or os.environ.get(ENVIRONMENT)
    file = named or DEFAULT
    try:
        with open(file, "rb") as opened:
            return SettingsFile(file, opened.read())
    except FileNotFoundError as error:
        if not named:
            return SettingsFile(file, b"")
        by = "the runtime options' ConfigPath" if path else f"the environment variable {ENVIRONMENT}"
        raise HostMissing(
            f"the settings file {file}, named by {by}, does not exist: create it or drop the name"
        ) from error
    except OSError as error:
        raise HostMissing(f"cannot read the settings file {file}: {error.strerror}") from error
