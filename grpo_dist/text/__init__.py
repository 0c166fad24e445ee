"""Chat templates, the text of tokens, and text made harmless."""
