"""The process that validates candidates beside a training, in order, until the training ends.

python -m tasks.training.validator CANDIDATES

What it is to do stands in `validator.json` there. It yields the processor to whatever else
wants it. Whenever it is killed, nothing is lost but the validation at hand.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from models import store
from tasks.training.background import SPEC
from tasks.training.candidates import Candidates
from tasks.training.optim import set_up_torch
from tasks.training.selection import score_waiting
from tasks.training.validation import Validator

NICENESS, IDLE_S = 10, 0.1


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the training's to handle
    threading.Thread(target=_end_with_training, daemon=True).start()
    os.nice(NICENESS)
    directory = Path(sys.argv[1])
    spec = json.loads((directory / SPEC).read_text())
    set_up_torch(spec["threads"])
    device = torch.device(spec["device"])
    model = store.build(spec["family"], spec["config"], spec["data"]).to(device)
    validate = Validator.of(spec, device)
    candidates = Candidates(directory.parent)
    while True:
        if not score_waiting(candidates, model, validate):
            time.sleep(IDLE_S)


def _end_with_training() -> None:
    # returns when the training closes its end, or dies; sys.stdin itself would be locked, and an
    # interpreter that ends with an error aborts over that
    os.read(sys.stdin.fileno(), 1)
    os._exit(0)


if __name__ == "__main__":
    main()
