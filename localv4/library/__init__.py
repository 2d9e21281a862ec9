"""Which models are known (`registry`) and which are on this machine (`installed`)."""
