"""Networks, each built from an input shape and a number of outputs. None of the built-in networks has batch statistics."""
