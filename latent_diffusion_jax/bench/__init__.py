"""What the verb `bench` does: measures parts of the package, each in a process of its own.

`measures` says what is measured, `worker` how a process is told to, `turns` has those of a row take
turns, `table` prints. Peers in other libraries are workers too (`benchmarks/peers.py`).
"""
