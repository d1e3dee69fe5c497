"""Phase 1: image <-> latent."""
