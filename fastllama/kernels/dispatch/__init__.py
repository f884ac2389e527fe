"""How an op call is checked, dispatched to an implementation, remembered and recorded."""
