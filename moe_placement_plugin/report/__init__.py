"""Show loads and plans: terminal tables, one self-contained HTML page, figures as PNG."""
