"""OpenAI's HTTP API over an AsyncEngine: requests in, deltas out.

wire.py (the JSON), translate.py (a request to a job), render.py (deltas to a response), errors.py and keys.py are pure:
they know no socket and load no torch. app.py has the endpoints, protocol.py the limits of a connection, server.py the
process: sockets, loading, signals, exit status. Of all these only server.py loads the runtime.
"""
