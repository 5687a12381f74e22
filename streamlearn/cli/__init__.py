"""Commands: thin, and without torch or kafka at import, so that asking is quick."""
