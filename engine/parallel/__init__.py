"""How several processes compute one model: each rank has a part of every layer, and they meet twice a layer."""
