"""Hold the nouns: placement, load, topology, model shape, their differences and errors; numpy only, no files."""
