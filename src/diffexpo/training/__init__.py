"""Training: the engine, its checkpoints, metrics, processes, signals and the run lock. The only importer of
accelerate."""
