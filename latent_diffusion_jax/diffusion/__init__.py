"""Phase 2: from latents to noise and back."""
