"""The public ops: signature, checks, docstring, and which implementations each has."""
