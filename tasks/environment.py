"""Settings of the tools underneath, as environment variables; what the user set stays."""

from __future__ import annotations

import os
import sys
from pathlib import Path

STATE = ".genarena"  # checkpoints, Prefect's database, downloads; under the project's folder

FLOW_PID = "GENARENA_FLOW_PID"  # set by the flow for its stages

_LEASES = "prefect.server.concurrency.lease_storage"
_TASK_LINE = "%(asctime)s  %(task_run_name)-18s %(message)s"
DEFAULTS = {
    # telemetry: off
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DVC_NO_ANALYTICS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Prefect: a temporary server can take 30 s to start on a small machine
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    # a restart of the server: what runs hold of a limit is on disk, and runs wait for its return
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": f"{_LEASES}.filesystem",
    "PREFECT_CLIENT_MAX_RETRIES": "8",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_FLOW_RUN_FMT": "%(asctime)s  %(message)s",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_TASK_RUN_FMT": _TASK_LINE,
    "PREFECT_LOGGING_FORMATTERS_STANDARD_DATEFMT": "%H:%M:%S",
    # Ray Train: shorter teardown, fewer threads, no metrics exporter
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray: a training has the share of the processor that everyone has; Ray's own default (15)
    # has a weight of 36 to 1,024 beside any other busy process: its minutes would mean nothing
    "RAY_worker_niceness": "0",
    # MLflow: an outage costs seconds, not minutes; nothing pickled is loaded
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "RAY_COLOR_PREFIX": "0",
    "GIT_PYTHON_REFRESH": "quiet",
    # OpenMP: threads that wait spin briefly, then sleep; spinning on, they starve each other
    # wherever cores are shared (docs/performance.md)
    "GOMP_SPINCOUNT": "1000",
}


def prepare_environment() -> None:
    """Set the defaults; call before Prefect, Ray or MLflow are imported."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if "PREFECT_API_URL" not in os.environ:
        os.environ.setdefault("PREFECT_HOME", str(Path(STATE, "prefect").absolute()))
    here = str(Path(sys.executable).parent)  # so that `dvc` and `git` hooks find this environment
    if here not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([here, os.environ.get("PATH", "")])
