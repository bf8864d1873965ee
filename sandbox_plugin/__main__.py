"""`python -m sandbox_plugin`."""

import sys

from sandbox_plugin.cli.main import main

sys.exit(main())
