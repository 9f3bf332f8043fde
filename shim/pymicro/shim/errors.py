"""The errors of the shim, one tree, and the status that each becomes on the wire.

ShimError                   anything that a client should see as a clear message
|- InvalidRequest           the request, the spec, an annotation or a setting makes no sense
|  `- InvalidSettings       the settings file or an annotation
|- NotFound                 no such container, exec or file
|- AlreadyExists
|- WrongState               the operation does not fit the state of the task
|- Unsupported              a microVM cannot do this, or we do not (yet)
|- HostMissing              the host lacks something: a program, a device, a kernel or image file
|- StepTimeout              an external step took longer than its limit
|- SandboxDied              the VMM, virtiofsd or the agent is gone; says which and its last words
|- HookFailed               a hook of the spec's, on the host, ended badly; carries what it said
`- GuestError               the agent or crun refused; carries the guest's message
"""


class ShimError(Exception):
    """Base of every error with a message for the user: names the cause and, where there is one, the remedy."""


class InvalidRequest(ShimError):
    """The request, the spec, an annotation or a setting makes no sense."""


class InvalidSettings(InvalidRequest):
    """The settings file or an annotation has a wrong key or value."""


class NotFound(ShimError):
    """No such container, exec or file."""


class AlreadyExists(ShimError):
    """A container or exec with this id exists."""


class WrongState(ShimError):
    """The operation does not fit the state of the task."""


class Unsupported(ShimError):
    """A microVM cannot do this."""


class HostMissing(ShimError):
    """The host lacks something: a program, a device, a kernel or image file."""


class StepTimeout(ShimError):
    """An external step took longer than the settings allow."""


class SandboxDied(ShimError):
    """The VMM, virtiofsd or the agent is gone."""


class HookFailed(ShimError):
    """A hook of the host failed."""


class GuestError(ShimError):
    """The agent or crun refused a request."""


# google.rpc.Code values, as containerd's errdefs maps them. The first class that matches wins, so subclasses come
# first.
STATUS: tuple[tuple[type[BaseException], int], ...] = (
    (InvalidRequest, 3),
    (StepTimeout, 4),
    (NotFound, 5),
    (AlreadyExists, 6),
    (WrongState, 9),
    (Unsupported, 12),
    (HostMissing, 9),
    (SandboxDied, 14),
    (HookFailed, 2),
    (GuestError, 2),
    (NotImplementedError, 12),
)
UNKNOWN = 2


def status_code(error: BaseException) -> int:
    """Return the google.rpc.Code for `error`, by its type and never by its text."""
    return next((code for kind, code in STATUS if isinstance(error, kind)), UNKNOWN)
