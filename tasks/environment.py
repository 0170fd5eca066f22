"""Settings of the tools underneath, as environment variables; what the user set stays."""

from __future__ import annotations

import ctypes
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

# of mallopt(3): from which size on a block is a mapping of its own (before glibc 2.35 no more than
# 32 MiB is taken), how much may lie free at the end of the heap, and how much it grows by, on which
# depends whether a thread other than the first gives its heap back
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD = -3, -1, -2
KEEP = (
    (M_MMAP_THRESHOLD, 32 * 2**20),
    (M_TRIM_THRESHOLD, 2**31 - 1),
    (M_TOP_PAD, 64 * 2**20),
    (M_MMAP_THRESHOLD, 256 * 2**20),
)


def prepare_environment() -> None:
    """Set the defaults; call before Prefect, Ray or MLflow are imported."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if "PREFECT_API_URL" not in os.environ:
        os.environ.setdefault("PREFECT_HOME", str(Path(STATE, "prefect").absolute()))
    here = str(Path(sys.executable).parent)  # so that `dvc` and `git` hooks find this environment
    if here not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([here, os.environ.get("PATH", "")])


def keep_freed_memory() -> None:
    """Have the C library keep what training or sampling frees, where it can be told so (glibc).

    It would give large blocks back to the system, which hands out empty pages the next time:
    thousands of page faults in each step (docs/performance.md). The process then holds what it
    held at its most. What variables of the environment say stays.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        for option, size in KEEP:
            mallopt(option, size)


def use_threads(threads: int) -> None:
    """So many for torch, and for numpy's products. Those read the environment when they are loaded,
    which in a fork was before (`tasks.warm`)."""
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(threads)
    threadpool_limits(threads, user_api="blas")
