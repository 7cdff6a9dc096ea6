"""Hold the nouns: placement, load, topology, model shape, their differences; no files."""
