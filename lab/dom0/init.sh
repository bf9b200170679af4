#!/bin/busybox sh
# First program of dom0, from the initramfs: puts the root together and hands over to dom0.sh inside it.
# Whatever fails here switches the machine off, which the lab sees at once.
B=/bin/busybox
fail() { echo "lab: init: $*"; $B poweroff -f; }

$B mount -t proc proc /proc
$B mount -t sysfs sys /sys
$B mount -t devtmpfs dev /dev
while read -r module; do $B insmod "/modules/$module" || fail "insmod $module"; done < /modules/order

mount_9p() { $B mount -t 9p -o "$3,trans=virtio,version=9p2000.L,msize=512000" "$1" "$2" || fail "mount $1"; }
$B mkdir -p /trees /checkout /upper /root
mount_9p trees /trees ro,cache=loose
mount_9p checkout /checkout ro,cache=loose
$B mount -t tmpfs -o size=90% tmpfs /upper
$B mkdir -p /upper/root /upper/root-work /upper/checkout /upper/checkout-work
lower=
while read -r tree; do lower="$lower:/trees/$tree"; done < /layers
$B mount -t overlay -o "lowerdir=${lower#:},upperdir=/upper/root,workdir=/upper/root-work" overlay /root ||
    fail "mount root"
for dir in proc sys dev; do $B mkdir -p "/root/$dir"; $B mount --move "/$dir" "/root/$dir"; done
$B mkdir -p /root/dev/pts /root/dev/shm /root/run /root/tmp /root/share /root/xenpv /root/guests
$B mount -t devpts devpts /root/dev/pts
$B mount -t tmpfs -o mode=1777 tmpfs /root/dev/shm
$B mount -t tmpfs tmpfs /root/run
$B mount -t tmpfs -o mode=1777,size=90% tmpfs /root/tmp
$B mount -t xenfs xenfs /root/proc/xen
# The checkout is writable here, but what is written (byte code, mostly) stays in this VM's memory.
$B mount -t overlay -o lowerdir=/checkout,upperdir=/upper/checkout,workdir=/upper/checkout-work overlay /root/xenpv ||
    fail "mount checkout"
$B mount --bind "/trees/$($B cat /guests)" /root/guests
mount_9p share /root/share rw,cache=mmap
$B cp -r /lab /root/run/lab
exec $B chroot /root /bin/bash /run/lab/dom0.sh
