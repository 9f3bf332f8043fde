"""PID 1 of the guest: prepares the VM, runs containers with crun on the host's request, streams their output.

Only C modules of the standard library are imported (`posix` instead of `os`, `_thread` instead of `threading`, ...):
importing the Python half of the library takes half a second under emulation. A unit test pins the list.
"""
