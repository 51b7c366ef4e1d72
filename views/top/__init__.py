"""The live view of a running system: `gather` reads the `figures`, `screen` draws them, `loop` repeats both.

It only reads, with Redis commands of bounded cost and a copy of the projection. If a part cannot be read, the screen
says so next to the last known figures, and tries that part again.
"""
