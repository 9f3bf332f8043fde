"""The agent's import budget: under emulation each module costs the guest's boot 4 ms, and most of the library more."""

import subprocess
import sys

EXPECTED = {
    # C modules of the standard library: no Python file is read for them
    *("_ctypes", "_json", "_socket", "_struct", "errno", "fcntl", "itertools", "posix", "select", "time", "_thread"),
    # the wire protocol
    *("pymicro", "pymicro.wire", "pymicro.wire.frames", "pymicro.wire.messages"),
    # the agent
    *("pymicro.agent", "pymicro.agent.__main__", "pymicro.agent.boot", "pymicro.agent.cgroups", "pymicro.agent.clock"),
    *("pymicro.agent.concurrency", "pymicro.agent.console", "pymicro.agent.container", "pymicro.agent.control"),
    *(
        "pymicro.agent.crun",
        "pymicro.agent.errors",
        "pymicro.agent.files",
        "pymicro.agent.handlers",
        "pymicro.agent.memory",
    ),
    *("pymicro.agent.mounts", "pymicro.agent.network", "pymicro.agent.process", "pymicro.agent.reaper"),
    *("pymicro.agent.streams", "pymicro.agent.syscalls", "pymicro.agent.devices", "pymicro.agent.vsock"),
}
SCRIPT = """
import sys
before = set(sys.modules) - {"posix", "time", "_thread"}  # the interpreter may have these, and need not
sys.path[:0] = PATHS
import pymicro.agent.__main__
print("\\n".join(sorted(set(sys.modules) - before)))
"""


def test_the_agent_imports_nothing_else() -> None:
    paths = [path for path in sys.path if path.endswith(("agent", "protos"))]
    script = SCRIPT.replace("PATHS", repr(paths))
    command = [sys.executable, "-I", "-S", "-E", "-c", script]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert set(output.split()) == EXPECTED


def test_the_list_is_what_the_sources_import() -> None:
    """No function imports something later: that would be paid while a container starts."""
    paths = [path for path in sys.path if path.endswith(("agent", "protos"))]
    script = f"""
import ast, pathlib
for path in {paths!r}:
    for file in pathlib.Path(path).glob("pymicro/[aw]*/*.py"):
        for function in ast.walk(ast.parse(file.read_text())):
            if isinstance(function, ast.FunctionDef):
                for node in ast.walk(function):
                    if isinstance(node, (ast.Import, ast.ImportFrom)):
                        print(file, node.lineno)
"""
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert output == ""
