"""Stage `prepare`: a source becomes Parquet shards and a manifest.

python -m tasks.prepare --out data/prepared
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from tasks import stage
from tasks.data import shards
from tasks.data.config import DatasetConfig
from tasks.data.derive import derive
from tasks.data.sources import SOURCES
from tasks.params import load_params


def run(config: DatasetConfig, out: Path) -> dict[str, Any]:
    """Prepare `config` into `out`, replacing what is there only when all went well.

    Returns the manifest. Raises BadInput for a source that cannot be used.
    """
    fresh = out.with_name(f"{out.name}.new-{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        raw = derive(SOURCES[config.name](config), config)
        manifest = shards.write(fresh, raw, config)
        old = out.with_name(f"{out.name}.old-{os.getpid()}")
        if out.exists():
            out.rename(old)
        fresh.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return manifest


def main() -> None:
    arguments = stage.parser("prepare", __doc__)
    arguments.add_argument("--out", type=Path, default=Path("data/prepared"))
    args = arguments.parse_args()
    with stage.running("prepare"):
        manifest = run(load_params().dataset, args.out)
        counts = ", ".join(f"{n:,} {name}" for name, n in manifest["counts"].items())
        shape = "x".join(map(str, manifest["spec"]["shape"]))
        print(f"{manifest['name']}: {counts}; {shape}, {manifest['spec']['levels']} levels")
        leaked = manifest["duplicates"].get("images_in_more_than_one_split")
        if leaked:
            print(f"warning: {leaked} examples stand in more than one split")


if __name__ == "__main__":
    main()
