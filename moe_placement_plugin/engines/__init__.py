"""Put each engine behind its own plugin entry points.

Nothing here imports an engine at import time.
"""
