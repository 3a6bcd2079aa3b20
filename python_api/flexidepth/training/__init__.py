"""Training of routers and adapters: text and its packing, answers of the base model, made tasks."""
