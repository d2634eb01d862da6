"""Entry point of `python -m harness.report` (`make report`)."""

import sys

from harness.report.page import main

sys.exit(main())
