"""What containerd says to `start` on stdin, and its answer: the bootstrap protocol of containerd 2.3, or what it was.

containerd 2.3 and newer write BootstrapParams (protos/bootstrap.proto), older ones the runtime options alone, an Any,
or nothing. Neither says which it is, and an Any can pass for BootstrapParams: these are believed only where they name
the container and the namespace of the command line, as containerd's own shims do (pkg/shim/compat.go).
"""

from pymicro.shim import protowire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

TASK_VERSION: "Final" = 3
"""The version of the Task service that a BootstrapResult promises: with it, containers find their pod's shim by its
address, and no `start` runs for them.
"""
_DEBUG = -4
"""LogLevel, as Go's log/slog numbers them: what is below is more talkative."""
_OWN_OPTIONS = "runtimeoptions.v1.Options"  # containerd 1.6 says cri.runtimeoptions.v1.Options
_RUNC_OPTIONS = "containerd.runc.v1.Options"


class RuntimeOptions:
    """The options of containerd's runtime section, as far as they are for us.

    `config_path` names a settings file, `config_body` is TOML that changes it (runtimeoptions.v1.Options: CRI and
    Docker send these). `shim_cgroup` is a cgroup that the shim is to join (containerd.runc.v1.Options).
    """

    def __init__(self, config_path: str = "", config_body: bytes = b"", shim_cgroup: str = "") -> None:
        self.config_path = config_path
        self.config_body = config_body
        self.shim_cgroup = shim_cgroup

    def __repr__(self) -> str:
        return f"<RuntimeOptions {vars(self)}>"


class Bootstrap:
    """What containerd has said. `version` is its own, as "2.4.2", "" where it did not use the bootstrap protocol."""

    def __init__(self) -> None:
        self.version = ""
        self.understood = False
        """Whether it is to be answered with a BootstrapResult."""
        self.debug = False
        self.ttrpc_address = ""
        self.grpc_address = ""
        self.socket_dir = ""
        self.options = RuntimeOptions()

    def __repr__(self) -> str:
        return f"<Bootstrap {f'of containerd {self.version}' if self.understood else 'of before 2.3'} {self.options}>"


def parse(stdin: bytes, container_id: str, namespace: str) -> Bootstrap:
    """Return what `stdin` says. Raises ValueError where it is neither of the messages."""
    said = Bootstrap()
    try:
        fields = list(protowire.fields(stdin))
        found = dict(fields)  # of a field that comes twice the last one holds
        if (found.get(1), found.get(2)) == (container_id.encode(), namespace.encode()):
            said.understood = True
            said.debug = protowire.signed(found.get(3, 0)) <= _DEBUG
            for number, name in ((4, "version"), (5, "ttrpc_address"), (6, "grpc_address"), (9, "socket_dir")):
                setattr(said, name, protowire.text(found.get(number, b"")).removeprefix("unix://"))
            extensions = [protowire.data(value) for number, value in fields if number == 8]
            said.version = said.version.removeprefix("v")  # as released; distributions may build it without
            said.options = _from_extensions(extensions)
        else:
            said.options = runtime_options(stdin)
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(
            f"start's stdin ({len(stdin)} bytes) is neither BootstrapParams nor an Any of runtime options: {error}"
        ) from error
    return said


def _from_extensions(extensions: list[bytes]) -> RuntimeOptions:
    """Return the first options that are for us among the extensions, each of which holds an Any."""
    for extension in extensions:
        for number, value in protowire.fields(extension):
            options = runtime_options(protowire.data(value)) if number == 1 else RuntimeOptions()
            if any(vars(options).values()):
                return options
    return RuntimeOptions()


def runtime_options(message: bytes) -> RuntimeOptions:
    """Return the options in an Any. Those of other runtimes are for others: tolerated and ignored.

    Raises ValueError where it is no such message.
    """
    found = dict(protowire.fields(message))
    kind = protowire.text(found.get(1, b"")).rpartition("/")[2]
    if not kind.endswith((_OWN_OPTIONS, _RUNC_OPTIONS)):
        return RuntimeOptions()
    own = dict(protowire.fields(protowire.data(found.get(2, b""))))
    if kind.endswith(_OWN_OPTIONS):
        return RuntimeOptions(protowire.text(own.get(2, b"")), protowire.data(own.get(3, b"")))
    return RuntimeOptions(shim_cgroup=protowire.text(own.get(3, b"")))


def result(address: str, protocol: str) -> bytes:
    """Return a BootstrapResult: version = 1, address = 2, protocol = 3."""
    return protowire.field(1, TASK_VERSION) + protowire.field(2, address) + protowire.field(3, protocol)
