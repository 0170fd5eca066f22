"""Makes buckets that are not there yet: `python buckets.py mlflow dvc`.

The address and the keys are boto3's own variables, AWS_ENDPOINT_URL and AWS_ACCESS_KEY_ID.
"""

from __future__ import annotations

import sys


def make(names: list[str]) -> None:
    import boto3

    s3 = boto3.client("s3")
    there = {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}
    region = s3.meta.region_name
    for name in names:
        if name not in there:
            elsewhere = {} if region in (None, "us-east-1") else {"LocationConstraint": region}
            more = {"CreateBucketConfiguration": elsewhere} if elsewhere else {}
            s3.create_bucket(Bucket=name, **more)


if __name__ == "__main__":
    make(sys.argv[1:])
