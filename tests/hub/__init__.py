"""A local model and dataset hub for tests: `server` speaks the hub's API, `stand_ins` makes what it serves."""
