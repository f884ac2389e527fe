"""AsyncEngine: requests from asyncio tasks, their streams and statistics."""
