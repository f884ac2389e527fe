"""What `fastllama bench ops` measures: every op at the shapes of a Llama beside torch, judged and then timed."""
