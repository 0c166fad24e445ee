"""`python -m grpo_dist VERB`: see cli/main.py."""

from grpo_dist.cli.main import program

program()
