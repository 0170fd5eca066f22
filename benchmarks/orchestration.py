"""What orchestration costs: the whole of a run against the seconds that its loops trained.

    .venv/bin/python -m benchmarks.orchestration --json orchestration.json

A new project of the real code in a temporary folder, the default settings, digits; then the same
command again, which has nothing to do. The difference of the first is not all orchestration: the
data, the classifier, validation and evaluation are in it, and families train side by side where
there are processors for it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.pairs import ROOT, arguments, hardware
from tests.projects import environment, make_project

AGAIN = 10  # seconds


def timed(project: Path, *words: str) -> float:
    variables = environment(project)
    variables.pop("OMP_NUM_THREADS", None)
    begun = time.perf_counter()
    command = [sys.executable, "-m", "genarena", "run", *words]
    done = subprocess.run(
        command, cwd=project, env=variables, text=True, check=False, capture_output=True
    )
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return time.perf_counter() - begun


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--families", default="vae dcgan")
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        project = make_project(Path(folder) / "project", {})
        (project / "params.yaml").write_text((ROOT / "params.yaml").read_text())
        words = ("--families", options.families, "--steps", str(options.steps))
        whole = timed(project, *words)
        facts = project.glob("artifacts/train/*/train.json")
        loops = {file.parent.name: json.loads(file.read_text())["train_seconds"] for file in facts}
        again = [timed(project, *words) for _ in range(options.rounds)]
    rest = whole - sum(loops.values())
    told = ", ".join(f"{name} {value:.1f} s" for name, value in loops.items())
    print(f"whole run {whole:.1f} s; loops: {told}; the rest {rest:.1f} s")
    print(f"again, nothing changed: {', '.join(f'{s:.1f}' for s in again)} s (goal {AGAIN} s)")
    if options.json:
        found = {"whole_s": whole, "loops_s": loops, "rest_s": rest, "again_s": again}
        found |= {"hardware": hardware(), "families": options.families, "steps": options.steps}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
