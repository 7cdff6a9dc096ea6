"""Read and write every file and wire form of placements and loads."""
