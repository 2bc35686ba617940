"""Attribution graphs by circuit-tracer, in an environment of its own."""
