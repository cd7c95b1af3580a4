"""The gateway: one ASGI application in front of all models of an endpoint.

It checks who asks (`keys`), how much (`limits`) and what (`body`, `fields`, `images`), leases a place on an engine
(`routes`), and passes the engine's bytes on (`upstream`, `stream`). It imports neither Ray nor vLLM.
"""

from serving.gateway.gateway import Gateway
from serving.gateway.keys import Keys, key_line, new_key
from serving.gateway.routes import Backend, Place, Route
from serving.gateway.settings import Settings

__all__ = ["Backend", "Gateway", "Keys", "Place", "Route", "Settings", "key_line", "new_key"]
