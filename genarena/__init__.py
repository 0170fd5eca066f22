"""The console command: what a person types. It starts the flow; the work is in `tasks`."""
