"""Several hosts: their ranks agree on one placement before weights load, and notice when a host vanishes.

- `identity`: which host this is, and which ranks share one.
- `parcel`: a placement as text that travels in the engine's config and through its store.
- `agreement`: what each rank is about to serve, compared on all of them.
- `watch`: hosts that do not join, and hosts that vanish.
- `bounded`: a store whose answers are waited for only so long.
"""
