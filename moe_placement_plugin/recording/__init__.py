"""Count tokens per expert while a server runs, write them down, and report them as metrics."""
