#!/usr/bin/env bash
# Several hosts on one machine: network namespaces with an address, a name and a link of their own,
# behind one switch.
#
#   scripts/hosts.sh up NAME [COUNT]              hosts NAME0, NAME1, ... (default 2) with
#                                                 addresses 10.77.0.1, 10.77.0.2, ...
#   scripts/hosts.sh exec NAME NUMBER COMMAND...  run a command on host NUMBER, in its network and
#                                                 under its name
#   scripts/hosts.sh link NAME NUMBER down|up     pull host NUMBER's cable: its packets and those
#                                                 for it are lost without a word
#   scripts/hosts.sh bytes NAME NUMBER            "received sent": bytes that crossed host NUMBER's
#                                                 interface so far
#   scripts/hosts.sh down NAME                    take all of it away again, and end what still
#                                                 runs there
#
# Needs root and iproute2. The switch is a namespace too: nothing changes in the machine's own
# network.
set -euo pipefail

usage() {
    sed -n '2,/^$/{s/^# \{0,1\}//p}' "$0" >&2
    exit 2
}

[[ $# -ge 2 ]] || usage
action=$1 name=$2
shift 2
[[ $name =~ ^[a-z][a-z0-9-]*$ ]] || {
    echo "hosts.sh: NAME $name: give lower-case letters, digits and dashes" >&2
    exit 2
}
switch=$name-switch
state=${TMPDIR:-/tmp}/$name.hosts # what the hosts have in place of the machine's own files

host() {
    ip netns list | grep -q "^$name$1\( \|$\)" || {
        echo "hosts.sh: there is no host $name$1: hosts.sh up $name" >&2
        exit 1
    }
}

down() {
    local namespace shared
    local pattern="^$name([0-9]+|-switch)$"
    for namespace in $(ip netns list | awk '{print $1}' | grep -E "$pattern" || true); do
        ip netns pids "$namespace" | xargs -r kill -KILL 2> /dev/null || true
        ip netns del "$namespace"
    done
    for shared in "$state"/shm*; do
        if mountpoint -q "$shared"; then
            umount --lazy "$shared"
        fi
    done
    rm -rf "$state"
}

up() {
    local count=$1 number
    down
    trap 'down' ERR
    ip netns add "$switch"
    # With a delay a link carries nothing for 15 s after it comes up.
    ip -n "$switch" link add bridge type bridge forward_delay 0
    ip -n "$switch" link set bridge up
    mkdir -p "$state"
    echo "127.0.0.1 localhost" > "$state/hosts"
    echo "nameserver 127.0.0.1" > "$state/resolv.conf"
    for ((number = 0; number < count; number++)); do
        ip netns add "$name$number"
        ip -n "$name$number" link set lo up
        ip -n "$switch" link add "port$number" type veth peer name eth0 netns "$name$number"
        ip -n "$switch" link set "port$number" master bridge up
        ip -n "$name$number" addr add "10.77.0.$((number + 1))/24" dev eth0
        ip -n "$name$number" link set eth0 up
        ip -n "$name$number" route add default via "10.77.0.$((number + 1))"
        echo "10.77.0.$((number + 1)) $name$number" >> "$state/hosts"
        mkdir "$state/shm$number"
        mount -t tmpfs tmpfs "$state/shm$number"
    done
}

case $action in
    up) up "${1:-2}" ;;
    down) down ;;
    link)
        host "${1:?}"
        ip -n "$switch" link set "port$1" "${2:?}"
        ;;
    bytes)
        host "${1:?}"
        ip netns exec "$name$1" cat /sys/class/net/eth0/statistics/{rx,tx}_bytes | xargs
        ;;
    exec)
        host "${1:?}"
        number=$1
        shift
        # A host has a name and shared memory of its own, and knows the others' names. It asks no
        # name server, which would be waited for.
        # shellcheck disable=SC2016
        exec ip netns exec "$name$number" unshare --uts bash -c '
            set -e
            name=$1 state=$2 number=$3
            shift 3
            hostname "$name$number"
            mount --bind "$state/hosts" /etc/hosts
            mount --bind "$state/resolv.conf" /etc/resolv.conf
            mount --bind "$state/shm$number" /dev/shm
            exec "$@"' hosts.sh "$name" "$state" "$number" "$@"
        ;;
    *) usage ;;
esac
