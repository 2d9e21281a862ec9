"""Running programs of the fast engine on an NVIDIA GPU; nothing here is imported without need."""
