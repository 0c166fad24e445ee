"""This project's engine: prompts shared by their groups, decoding in place."""
