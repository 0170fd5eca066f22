"""The console command: what a person types. It starts the flow; the work is in `tasks`."""

import tasks  # noqa: F401  # first: it sets what torch's threads read when they are loaded
