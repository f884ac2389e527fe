"""Makes the packaged tiny Llama from one seed: stories, tokenizer, training, evaluation, export."""
