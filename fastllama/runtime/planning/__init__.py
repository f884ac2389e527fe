"""What the next step computes, and in which KV pages: plain Python, no torch."""
