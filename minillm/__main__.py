"""`python -m minillm`, and `accelerate launch -m minillm`."""

import sys

from minillm.cli import main

sys.exit(main())
