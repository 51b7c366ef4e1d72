"""The live view of a running system: `gather` reads the `figures`, `screen` draws them, `loop` does so again and again.

It only reads: commands of constant or bounded cost to Redis, and a copy of the projection. If a part cannot be read,
the screen says so beside the last known figures, and the part is asked for again.
"""
