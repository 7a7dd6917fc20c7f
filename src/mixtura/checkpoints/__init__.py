"""Any transformers MoE checkpoint, as routers and experts: found, read expert by expert, and written anew."""
