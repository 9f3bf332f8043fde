"""The protocol between the shim (host) and the agent (guest): framing and message shapes, no I/O.

Both sides import this package and it imports nobody. In the guest every import costs ten times what it costs on a
host, so nothing here imports `typing`, `dataclasses` or `enum` at run time.
"""
