#!/bin/busybox sh
# PID 1 of the lab's initramfs: make a root of the host's files, read-only, and of memory for what is written.
set -e
/bin/busybox mount -t devtmpfs dev /dev
for module in /modules/*; do /bin/busybox insmod "$module"; done

share() { # tag, where, options
    /bin/busybox mkdir -p "$2"
    /bin/busybox mount -t 9p -o "trans=virtio,version=9p2000.L,msize=524288,$3" "$1" "$2"
}

share host /host ro,cache=loose
/bin/busybox mkdir -p /memory /root
/bin/busybox mount -t tmpfs -o mode=755 memory /memory
/bin/busybox mkdir /memory/upper /memory/work
/bin/busybox mount -t overlay -o lowerdir=/host,upperdir=/memory/upper,workdir=/memory/work root /root

/bin/busybox mount -t tmpfs -o mode=755 run /root/run
share lab /root/run/kvm-lab cache=none
exec /bin/busybox switch_root /root /bin/sh /run/kvm-lab/second.sh
