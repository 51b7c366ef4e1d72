"""The Redis server: connections, pipelined commands, and the embedded Valkey."""
