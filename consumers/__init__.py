"""Workers, projector and commands: what runs.

A FastStream app reads the task streams; every task becomes one call of `inference`.
"""
