"""All that a machine with a GPU should say in its first minutes: stages in the order of their worth, and a verdict."""
