"""`python -m grpo_dist VERB`: see cli/main.py."""

import sys

from grpo_dist.cli.main import main

sys.exit(main())
