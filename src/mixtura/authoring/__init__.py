"""What writing a method takes: templates to start from, contracts to keep, pages that are generated."""
