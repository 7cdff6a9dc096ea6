"""For all tests: hypothesis measures no time, since machines that run these are shared and stop now and then."""

from hypothesis import settings

settings.register_profile("steady", deadline=None)
settings.load_profile("steady")
