"""The daemon: builds everything, learns in one loop, and saves what it has learned."""
