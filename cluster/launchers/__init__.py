"""How workers are started, looked after and ended, one platform a module."""
