"""Methods by name: an objective and a route each."""

from jdecouple.methods import objectives, routes
from jdecouple.methods.table import Method, arguments, get, names, register, source

__all__ = ["Method", "arguments", "get", "names", "objectives", "register", "routes", "source"]
