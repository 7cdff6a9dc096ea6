"""Test the script that makes hosts: they are separate, and nothing is left behind."""

from __future__ import annotations

import socket
import subprocess
import sys

from .network import Hosts, made


def namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout


def links() -> str:
    return subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True).stdout


PROBE = """
import socket, sys
from moe_placement_plugin.hosts.identity import address_towards, host_key
print(socket.gethostname(), address_towards(sys.argv[1]), host_key())
"""


def test_hosts_are_hosts_and_vanish_again():
    name, links_before = socket.gethostname(), links()
    for hosts in made("script", 3):
        assert links() == links_before, "the machine's own network must not change"
        said = [
            subprocess.run(
                hosts.on(n, [sys.executable, "-c", PROBE, hosts.address(0)]),
                capture_output=True,
                text=True,
            )
            for n in range(3)
        ]
        words = [s.stdout.split() for s in said]
        assert [w[0] for w in words] == [f"{hosts.name}{n}" for n in range(3)], said
        assert [w[1] for w in words] == [hosts.address(n) for n in range(3)]
        assert len({s.stdout.split(maxsplit=2)[2] for s in said}) == 3
        assert check_bytes(hosts) > 1_000_000
    # Whatever else this machine's users make meanwhile.
    assert socket.gethostname() == name and hosts.name not in namespaces()


SERVER = (
    "import socket; s = socket.create_server(('', 5000)); c, _ = s.accept(); n = 0\n"
    "while d := c.recv(65536): n += len(d)\nprint(n)"
)
CLIENT = """
import socket, sys, time
for _ in range(1000):
    try:
        s = socket.create_connection((sys.argv[1], 5000), timeout=5); break
    except OSError:
        time.sleep(0.05)
s.sendall(bytes(1_000_000))
"""


def check_bytes(hosts: Hosts) -> int:
    """Send a million bytes from host 1 to host 0; what the interface of host 1 counted."""
    received_before, sent_before = hosts.traffic(1)
    server = subprocess.Popen(
        hosts.on(0, [sys.executable, "-c", SERVER]), stdout=subprocess.PIPE, text=True
    )
    subprocess.run(hosts.on(1, [sys.executable, "-c", CLIENT, hosts.address(0)]), check=True)
    assert server.communicate(timeout=60)[0].strip() == "1000000"
    received, sent = hosts.traffic(1)
    assert received - received_before < 100_000
    return sent - sent_before
