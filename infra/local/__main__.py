"""`python -m infra.local`: every server up for the project in this folder, until Ctrl-C."""

from __future__ import annotations

import argparse
import signal
import time
from pathlib import Path

from infra.local.servers import Topology, topology
from tasks.environment import STATE
from tasks.errors import BadInput, exit_on_bad_input


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m infra.local", description=__doc__)
    parser.add_argument("--cpus", type=int, default=1, help="of each of the three Ray nodes")
    cpus = parser.parse_args().cpus
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with exit_on_bad_input("infra.local"):
        project = Path.cwd()
        if not (project / "prefect.yaml").is_file():
            raise BadInput(f"{project}: no prefect.yaml here; run it in the project's folder")
        started = time.monotonic()
        print("starting; this takes half a minute", flush=True)
        try:
            with topology(project, cpus) as there:
                _describe(there, time.monotonic() - started)
                _watch(there)
        except KeyboardInterrupt:
            print("stopped; nothing is kept")


def _describe(there: Topology, seconds: float) -> None:
    client = there.client
    lines = {
        "MLflow": f"{client['MLFLOW_TRACKING_URI']} (admin; password: servers.env)",
        "Prefect": client["PREFECT_API_URL"].removesuffix("/api"),
        "Ray": f"{client['RAY_ADDRESS']}, jobs and dashboard {client['RAY_API_SERVER_ADDRESS']}",
        "S3": client["AWS_ENDPOINT_URL"],
        "Logs": f"{STATE}/servers/*.log",
    }
    for name, value in lines.items():
        print(f"{name + ':':9}{value}")
    print(f"up after {seconds:.0f} s. A client: set -a; . {STATE}/servers.env; set +a")
    print("Ctrl-C ends everything.", flush=True)


def _watch(there: Topology) -> None:
    """Until one of them ends, which is an error."""
    while True:
        time.sleep(0.5)
        for server in there.servers.values():
            if not server.running():
                raise BadInput(f"{server.name} ended; see {server.log}")


if __name__ == "__main__":
    main()
