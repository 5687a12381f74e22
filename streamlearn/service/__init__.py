"""HTTP: a Unix socket for control, a read-only listener for scraping, and the client that the CLI uses."""
