"""Training such models, the arena that compares methods, and the making of the specimen."""
