"""The serving runtime: the scheduler, the paged KV cache with its prefix cache, and the engine that runs the model."""
