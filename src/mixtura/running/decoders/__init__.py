"""The loop that decoders are run by: rows and caches, steering of routers, drawing, forking, stopping."""
