"""Let the ranks of several hosts agree on one placement, and notice when a host vanishes.

- `identity`: which host this is, and which ranks share one.
- `handshake`: what each rank is about to serve, compared on all of them before weights load.
- `session`: a worker's part in both, the same for either engine.
- `watch`: hosts that do not join, and hosts that vanish.
- `bounded_store`: a store whose answers are waited for only so long.
"""
