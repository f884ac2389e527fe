"""Checks op calls, dispatches them to an implementation, caches the checks, and records calls for replay."""
