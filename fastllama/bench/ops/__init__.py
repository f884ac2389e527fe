"""The measurements of `fastllama bench ops`: every op at the shapes of a Llama against torch, checked, then timed."""
