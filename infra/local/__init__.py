"""The production topology natively on one machine: every server a process of its own."""
