"""Every table that a command prints: rows of a result in, text out."""
