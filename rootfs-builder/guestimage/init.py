"""PID 1's first file: put the agent on the path and run it. Kept this short because it is on the way of every boot."""

import sys

sys.path.insert(0, "/usr/lib/pymicro")

from pymicro.agent.__main__ import main  # noqa: E402  # the path comes first

main()
