"""Prefect flows: what runs when. The work itself is in `tasks`."""

from tasks.environment import prepare_environment

prepare_environment()
