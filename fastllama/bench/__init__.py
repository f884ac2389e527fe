"""What `fastllama bench` measures on the user's own machine."""
