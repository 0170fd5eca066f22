"""Ray: a head and more nodes, each with processes, ports and a loopback address of its own."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from infra.local.process import Server, free_port, http_ok, plain_environment

OBJECTS_MB = 200  # of each node's object store: three share this machine's memory
# Ray takes 127.0.0.1 for "the address by which others reach this machine"; these it leaves alone
ADDRESSES = ("127.0.0.2", "127.0.0.3", "127.0.0.4")


def ray_nodes(
    folder: Path, scratch: Path, environment: Mapping[str, str], cpus: int
) -> tuple[list[Server], str, str]:
    """The nodes, head first, none started; the cluster's address, and the Jobs API's."""
    host, *others = ADDRESSES
    port, dashboard = free_port(6379, host), free_port(8265, host)
    address, jobs = f"{host}:{port}", f"http://{host}:{dashboard}"
    head = [
        *("--head", "--port", str(port)),
        *("--dashboard-host", host, "--dashboard-port", str(dashboard)),
        *("--ray-client-server-port", str(free_port(10001, host))),
    ]
    # Ray Train asks it at the end of a training; where it has to search, that is half a minute
    environment = {**environment, "RAY_API_SERVER_ADDRESS": jobs}
    nodes = [_node("ray-head", host, folder, scratch, environment, cpus, head)]
    for number, other in enumerate(others, 1):
        name, joins = f"ray-node-{number}", ["--address", address]
        nodes.append(_node(name, other, folder, scratch, environment, cpus, joins))
    nodes[0].ready = http_ok(f"{jobs}/api/gcs_healthz")
    return nodes, address, jobs


def _node(
    name: str,
    host: str,
    folder: Path,
    scratch: Path,
    environment: Mapping[str, str],
    cpus: int,
    more: list[str],
) -> Server:
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *more),
        *("--node-ip-address", host, "--node-name", name, "--num-cpus", str(cpus)),
        # sockets of its own: two nodes that start at once would choose the same names
        *("--temp-dir", str(scratch / name)),
        *("--object-store-memory", str(OBJECTS_MB * 2**20), "--disable-usage-stats"),
        # any free ports: some of these are listened at on every address of the machine
        *("--min-worker-port", "0", "--max-worker-port", "0"),
        *("--dashboard-agent-listen-port", str(free_port(52365, host))),
    ]
    return Server(
        name, command, plain_environment(environment), folder, words="Ray runtime started"
    )
