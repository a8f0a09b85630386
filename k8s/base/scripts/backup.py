"""Bring a dump of the database to the bucket (`upload FILE`) or back (`download FILE`).

BACKUP_URI is s3://bucket/prefix. An upload is named by its time in UTC, and all but the newest KEEP are removed. A
download takes the one that BACKUP names, or the newest for `latest`.
"""

import os
import sys
from datetime import UTC, datetime
from pathlib import Path

import boto3

verb, file = sys.argv[1], Path(sys.argv[2])
bucket, _, prefix = os.environ["BACKUP_URI"].removeprefix("s3://").partition("/")
prefix = f"{prefix.strip('/')}/"
s3 = boto3.client("s3")


def kept() -> list[str]:
    """Keys of all backups, the oldest first: their names are their times."""
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    return sorted(key for key in keys if key.endswith(".dump"))


if verb == "upload":
    key = f"{prefix}{datetime.now(UTC):%Y-%m-%dT%H%M%SZ}.dump"
    s3.upload_file(str(file), bucket, key)
    stored = s3.head_object(Bucket=bucket, Key=key)["ContentLength"]
    if stored != file.stat().st_size:
        sys.exit(f"error: {key} has {stored} bytes in the bucket, {file.stat().st_size} here")
    print(f"backup s3://{bucket}/{key}, {stored} bytes")
    for old in kept()[: -int(os.environ["KEEP"])]:
        s3.delete_object(Bucket=bucket, Key=old)
        print(f"removed s3://{bucket}/{old}")
else:
    found = kept()
    wanted = os.environ["BACKUP"]
    key = found[-1] if found and wanted == "latest" else f"{prefix}{wanted}"
    if key not in found:
        sys.exit(f"error: no backup {wanted} in s3://{bucket}/{prefix}; there are: {', '.join(found) or 'none'}")
    s3.download_file(bucket, key, str(file))
    print(f"backup s3://{bucket}/{key} is here, {file.stat().st_size} bytes")
