"""One address before many models: routed, combined, counted, and never beyond a key's budget."""
