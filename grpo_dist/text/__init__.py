"""Chat templates, the text of tokens, text made harmless, and files that are written complete or not at all."""
