"""PID 1's first file: put the agent on the path and run it. Kept this short because it is on the way of every boot."""

import sys

sys.path.append("/usr/lib/pymicro")  # last: the standard library's many look-ups are not to search here first

from pymicro.agent.__main__ import main

main()
