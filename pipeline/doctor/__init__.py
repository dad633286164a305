"""Can a config run here, and is it set up right: asked before it costs money."""
