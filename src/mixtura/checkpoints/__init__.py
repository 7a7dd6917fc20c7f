"""Any transformers MoE model as routers and experts: opened from headers, read, and written anew."""
