"""The stages of the pipeline, one module each; `python -m tasks.<stage>` runs one."""

import os
import sys

from tasks.environment import DEFAULTS

# read when torch is loaded, which is before `prepare_environment`
os.environ.setdefault("GOMP_SPINCOUNT", DEFAULTS["GOMP_SPINCOUNT"])

if "GENARENA_WARM" in os.environ and sys.argv[:1] == ["-m"]:
    from tasks.handover import MODULES, hand_over

    words = sys.orig_argv[sys.orig_argv.index("-m") + 1 :]
    if words[0] in MODULES:
        hand_over(words)  # and no more of this process, where that can be
