"""Writing a method: a template to start from, the contract to keep, the pages generated of it."""
