"""A host with KVM where there is none: a machine with nested virtualisation, emulated by QEMU, and commands run in it.

`kernel` has Debian's kernel and an initramfs, `machine` is QEMU's command line, `lab` runs a command; `first.sh` and
`second.sh` are PID 1 of the lab, before and after the host's files are its root.
"""
