"""Start a script on many cards and hosts: a backend starts the ranks, a small supervisor on each host ends them."""
