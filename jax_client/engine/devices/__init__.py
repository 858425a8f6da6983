"""The devices of a mesh, of this host alone or of several: their arrays, and what is launched on them."""
