"""EleutherAI's lm-evaluation-harness on this project's runtime: importing `model` adds "fastllama" to its models."""
