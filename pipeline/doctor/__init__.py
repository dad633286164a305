"""Whether a config can run here and is set up right: asked before it costs money."""
