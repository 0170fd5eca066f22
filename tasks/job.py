"""What a Ray job runs for `tasks.jobs`, on the cluster: one function, its answer to a file.

python -m tasks.job FOLDER
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from tasks import cluster
from tasks.cluster import nodes_lost
from tasks.environment import prepare_environment
from tasks.errors import Outage
from tasks.jobs import ANSWER, REQUEST
from tasks.params import ClusterConfig


def families_at_once(config: ClusterConfig) -> int:
    with cluster.connected(config):
        cluster.wait_for_room(config)
        return cluster.families_at_once(config)


def on_worker(
    config: ClusterConfig, function: str, kind: str, settings: dict[str, Any], folders: list[str]
) -> Any:
    return cluster.on_worker(config, _named(function), _named(kind)(**settings), *folders)


def main() -> None:
    prepare_environment()
    folder = Path(sys.argv[1])
    request = json.loads((folder / REQUEST).read_text())
    config, status = ClusterConfig(**request["cluster"]), 0
    try:
        answer = {"result": _named(request["function"])(config, *request["arguments"])}
    except Exception as error:  # told to whoever asked, who decides what becomes of it
        traceback.print_exc()
        kind = Outage.__name__ if nodes_lost(error) else type(error).__name__
        answer, status = {"kind": kind, "error": str(error)}, 1
    temporary = folder / f"{ANSWER}.new"
    temporary.write_text(json.dumps(answer))
    temporary.rename(folder / ANSWER)
    raise SystemExit(status)


def _named(name: str) -> Any:
    module, _, inside = name.partition(":")
    return getattr(importlib.import_module(module), inside)


if __name__ == "__main__":
    main()
