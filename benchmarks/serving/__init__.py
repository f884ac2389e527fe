"""`fastllama serve` measured from outside: HTTP beside the AsyncEngine below it, and clients of every kind."""
