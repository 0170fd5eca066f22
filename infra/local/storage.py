"""An S3-compatible server in memory, with its buckets."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from infra.local.process import HOST, Server, free_port, http_ok, plain_environment

BUCKETS = ("mlflow", "dvc")


def storage(folder: Path) -> tuple[Server, str]:
    """moto's server, not yet started, and its address."""
    port = free_port(9000)
    address = f"http://{HOST}:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(port)]
    ready = http_ok(f"{address}/moto-api/")
    return Server("s3", command, plain_environment(), folder, ready=ready), address


def make_buckets(client: Mapping[str, str], names: Sequence[str] = BUCKETS) -> None:
    """Make the buckets, with the settings of a client's environment."""
    s3 = connect(client)
    for name in names:
        s3.create_bucket(Bucket=name)


def connect(client: Mapping[str, str]):  # type: ignore[no-untyped-def]
    """A boto3 client with the settings of a client's environment."""
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=client["AWS_ENDPOINT_URL"],
        region_name=client["AWS_DEFAULT_REGION"],
        aws_access_key_id=client["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=client["AWS_SECRET_ACCESS_KEY"],
    )
