"""The daemon's HTTP services: a Unix socket for commands, a read-only TCP port for metrics, and the CLI's client."""
