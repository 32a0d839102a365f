"""Training: ``config.RunConfig`` says what a run is, ``loop.train`` runs it."""
