"""From files to prompts, and the order in which a run takes them."""
