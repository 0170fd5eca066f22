"""Which code made a result: the commit of the project's folder."""

from __future__ import annotations

import subprocess


def git_state() -> str | None:
    """`<commit>`, or `<commit> with changes` where tracked files differ from it; None without git.

    What runs write themselves (`params.yaml` by the options of the command, `dvc.lock`, metrics,
    reports) does not count: the results carry their parameters, and data by its hash.
    """
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    ours = (":!params.yaml", ":!dvc.lock", ":!metrics", ":!reports")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *ours)
    return f"{commit} with changes" if changed else commit


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
