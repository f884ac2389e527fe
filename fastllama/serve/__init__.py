"""OpenAI's HTTP API on top of an AsyncEngine.

wire.py (JSON schemas), translate.py (request to job), render.py (deltas to response), errors.py and keys.py are pure:
they use no sockets and do not load torch. app.py has the endpoints, protocol.py the limits of a connection, server.py
the process: sockets, loading, signals, exit status. Only server.py loads the runtime.
"""
