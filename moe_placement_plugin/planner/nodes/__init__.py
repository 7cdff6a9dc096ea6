"""Keep experts that belong together on one node."""
