"""Options: their declaration, how they are read, and their checks."""
