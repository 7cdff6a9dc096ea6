"""For all tests: hypothesis measures no time, since machines that run these are shared and stop now and then; names are not waited for."""

import os

from hypothesis import settings

settings.register_profile("steady", deadline=None)
settings.load_profile("steady")

# torch asks for the name of whoever connects to a store. Where no name server answers that takes the system's resolver five seconds, for
# one connection in twenty or so. Processes that tests start inherit this.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
