"""`python -m vit_explain_callback` is the command `vit-explain`."""

import sys

from vit_explain_callback.cli.command import main

sys.exit(main())
