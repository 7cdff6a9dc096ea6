"""Let the tests import the scripts of the tiny model, which import each other."""

import sys

from .accuracy import TINY

if str(TINY) not in sys.path:
    sys.path.append(str(TINY))
