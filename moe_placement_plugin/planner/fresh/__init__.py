"""Plan a placement from nothing: replicate, pack, refine."""
