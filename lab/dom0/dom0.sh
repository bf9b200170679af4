# Runs in dom0's own root, as its first process: starts what xl needs, then the agent (or a shell) until the end.
# shellcheck shell=bash
. /run/lab/settings
export PATH=/usr/local/sbin:/usr/local/bin:/usr/lib/xen-$XEN/bin:/usr/sbin:/usr/bin
export HOME=/root LANG=C.UTF-8 TERM=${TERM:-linux} TMPDIR=/tmp PYTHONPATH=/xenpv/src:/xenpv

mkdir -p /run/xen /run/xenstored /run/lock /var/lib/xenstored /var/lib/xen /var/log/xen /share/consoles /usr/local/bin
printf '#!/bin/sh\nexec python3 -m xenpv "$@"\n' > /usr/local/bin/xenpv
printf '#!/bin/sh\nexec python3 -m xenpv.save_helper.program "$@"\n' > /usr/local/bin/xenpv-save-helper
chmod +x /usr/local/bin/xenpv /usr/local/bin/xenpv-save-helper
hostname xen
ip link set lo up
if [ -e /sys/class/net/eth0 ]; then
    ip addr add 10.0.2.15/24 dev eth0 && ip link set eth0 up && ip route add default via 10.0.2.2
fi

xenstored --pid-file /run/xenstored.pid || echo o > /proc/sysrq-trigger
while ! [ -S /run/xenstored/socket ]; do sleep .05; done
xen-init-dom0 > /run/xen-init-dom0.log || cat /run/xen-init-dom0.log
xenconsoled --log=guest --log-dir=/share/consoles --pid-file=/run/xenconsoled.pid

if [ "$MODE" = shell ]; then
    cd /root || exit
    stty rows "$ROWS" cols "$COLUMNS" < /dev/hvc0
    setsid -c bash -i < /dev/hvc0 > /dev/hvc0 2>&1
else
    python3 /run/lab/agent.py
fi
sync
echo o > /proc/sysrq-trigger
sleep 60
