"""Codecs: the formats of a record's value. `registry.py` lists them."""
