"""What people look at: terminal tables, one self-contained HTML page, figures as PNG."""
