"""The live view of a running system: `gather` reads the `figures`, `screen` draws them, `loop` does so again and again.

It only looks: commands of constant or bounded cost to Redis, and a copy of the projection. What cannot be read
is told beside what was seen last, and asked for again.
"""
