"""The microbenchmarks of the ops: registry, inputs, peers, reports and the tuner."""
