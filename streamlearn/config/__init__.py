"""The configuration: the sections composed, the rules between them, the file, and the views."""
