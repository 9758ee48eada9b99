"""Nothing is lost: the library sets these arguments on configurations that have no others inside; all that are tested
here have."""

config_common_kwargs = {}
