#!/bin/sh
# PID 1 of the lab, on the host's files: be what systemd makes of a host, run the command, say how it ended, switch off.
lab=/run/kvm-lab
. $lab/environment
busybox=/bin/busybox

mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm /dev/mqueue
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t mqueue mqueue /dev/mqueue
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount --make-rshared /
ln -sfn /proc/self/fd /dev/fd
ln -sfn fd/0 /dev/stdin
ln -sfn fd/1 /dev/stdout
ln -sfn fd/2 /dev/stderr
for controller in $(cat /sys/fs/cgroup/cgroup.controllers); do
    echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control
done

# The kernel loads modules by this program; the host may have none, or one that looks for its own kernel's.
mkdir -p /lib/modules
ln -sfn "$LAB_MODULES" "/lib/modules/$(uname -r)"
printf '#!/bin/sh\nexec %s modprobe "$@"\n' $busybox >/run/modprobe
chmod 755 /run/modprobe
echo /run/modprobe >/proc/sys/kernel/modprobe
for module in kvm_amd vhost_vsock vhost_net tun loop dm_thin_pool; do
    $busybox modprobe $module || echo "no module $module"
done
$busybox ip link set lo up
hostname kvm-lab
echo always >/sys/kernel/mm/transparent_hugepage/enabled  # Debian's default; somebody may have changed the kernel's
ulimit -n 1048576

# The first CPU is left alone: machine.py says why.
for cpu in /sys/devices/system/cpu/cpu[1-9]*; do
    echo 1 >"$cpu/online"
done
mkdir /sys/fs/cgroup/first-cpu
echo 0 >/sys/fs/cgroup/first-cpu/cpuset.cpus
echo isolated >/sys/fs/cgroup/first-cpu/cpuset.cpus.partition
others=$(cat /sys/fs/cgroup/cpuset.cpus.effective)
for affinity in /proc/irq/*/smp_affinity_list; do
    echo "$others" >"$affinity"
done 2>/dev/null  # some interrupts have their place

# containerd cannot have its snapshots on an overlay; and what a checkout's build directory holds is the host's.
stamps=$(mktemp -d)
cp -a "$LAB_CHECKOUT/build/stamps" "$stamps" 2>/dev/null
mount -t tmpfs -o mode=755 build "$LAB_CHECKOUT/build"
cp -a "$stamps/." "$LAB_CHECKOUT/build" && rm -r "$stamps"
mkdir "$LAB_CHECKOUT/build/lab"
mount -t 9p -o trans=virtio,version=9p2000.L,msize=524288,cache=none files "$LAB_CHECKOUT/build/lab"

cd "$LAB_CHECKOUT" || exit
if [ -e $lab/command ]; then
    # Pipes, because only one process at a time may open such a port, and programs open /dev/stderr.
    mkfifo /run/out /run/err
    cat </run/out >/dev/vport0p1 &
    out=$!
    cat </run/err >/dev/vport0p2 &
    err=$!
    setsid bash $lab/command </dev/null >/run/out 2>/run/err
    status=$?
    (sleep 3; kill $out $err) 2>/dev/null &  # what the command left running may hold the pipes
    wait $out $err
else
    stty $LAB_SIZE </dev/hvc0
    setsid -c bash -i </dev/hvc0 >/dev/hvc0 2>&1
    status=$?
fi
echo $status >$lab/status
sync
$busybox poweroff -f
