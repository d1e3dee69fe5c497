"""Networks: no diffusion, no losses."""
