"""`make gpu`: tests and measurements on a GPU within minutes, the most valuable first, and a verdict."""
